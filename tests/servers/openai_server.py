# SPDX-License-Identifier: Apache-2.0
"""A real server on this machine that speaks enough of the OpenAI API, and misbehaves when told to.

Built on the standard library's server, so that a test decides every byte that travels.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Respond = Callable[[dict[str, Any]], dict[str, Any]]
"""From a request's body to `text`, and perhaps `finish_reason`, `usage` and other fields of the reply."""


@dataclass
class Fault:
    """What happens to a request instead of an answer.

    `kind`: `drop` (connection reset before a byte), `cut` (half of the body, then closed), `chunks` (a chunked body
    that never ends properly), `status` (an error reply), `raw` (these bytes with status 200), `slow` (answers, but
    late), `trickle` (a byte now and then).
    """

    kind: str
    status: int = 500
    body: bytes = b'{"error": {"message": "out of order"}}'
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


class FakeServer:
    """The server, what it was asked, and what it will do next."""

    def __init__(self, respond: Respond, *, models: list[str] | None = None, delay_s: float = 0.0) -> None:
        self.respond = respond
        self.models: list[dict[str, Any]] = [{"id": name} for name in (models or ["tiny"])]
        self.delay_s = delay_s
        self.faults: deque[Fault] = deque()
        """Taken one by one, by whichever request comes next."""
        self.fault_of: Callable[[dict[str, Any]], Fault | None] = lambda _: None
        """Decides by the request, and holds for as long as it says so."""
        self.models_fault: Fault | None = None
        self.asked: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        owner = self

        class Handler(_Handler):
            server_state = owner

        self._http = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    @contextmanager
    def running(self) -> Iterator[FakeServer]:
        thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.stop()
            thread.join()

    def stop(self) -> None:
        """Stop listening; connections that are open stay."""
        self._http.shutdown()
        self._http.server_close()

    def begin(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> Fault | None:
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            self.asked.append(body)
            self.paths.append(path)
            self.headers.append(headers)
            self.times.append(time.monotonic())
            return self.faults.popleft() if self.faults else self.fault_of(body)

    def end(self) -> None:
        with self._lock:
            self._at_once -= 1


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay silent: clients that go away are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server_state: FakeServer

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent."""

    def do_GET(self) -> None:
        state = self.server_state
        if state.models_fault is not None:
            self._misbehave(state.models_fault, {})
        else:
            self._send(200, json.dumps({"object": "list", "data": state.models}).encode())

    def do_POST(self) -> None:
        state = self.server_state
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fault = state.begin(self.path, body, {name.lower(): value for name, value in self.headers.items()})
        try:
            time.sleep(state.delay_s)
            if fault is None:
                self._send(200, self._answer(body))
            else:
                self._misbehave(fault, body)
        finally:
            state.end()

    def _answer(self, body: dict[str, Any]) -> bytes:
        made = {"finish_reason": "stop", "usage": {"prompt_tokens": 7, "completion_tokens": 3}, "model": body["model"]}
        made |= self.server_state.respond(body)
        text, finish = made.pop("text"), made.pop("finish_reason")
        content = {"text": text} if self.path.endswith("/v1/completions") else {"message": {"content": text}}
        return json.dumps({"choices": [{"index": 0, "finish_reason": finish, **content}], **made}).encode()

    def _misbehave(self, fault: Fault, body: dict[str, Any]) -> None:
        if fault.kind == "status":
            self._send(fault.status, fault.body, fault.headers)
        elif fault.kind == "raw":
            self._send(200, fault.body)
        elif fault.kind == "slow":
            time.sleep(fault.seconds)
            self._send(200, self._answer(body))
        elif fault.kind == "drop":
            # Linger of zero seconds: the connection is reset, not closed.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._close()
        elif fault.kind == "cut":
            whole = self._answer(body)
            self._head(200, {"Content-Length": str(len(whole))})
            self.wfile.write(whole[: len(whole) // 2])
            self._close()
        elif fault.kind == "chunks":
            whole = self._answer(body)
            self._head(200, {"Transfer-Encoding": "chunked"})
            self.wfile.write(b"%x\r\n%s\r\n" % (len(whole), whole))
            self._close()
        elif fault.kind == "trickle":
            whole = self._answer(body)
            self._head(200, {"Content-Length": str(len(whole))})
            for byte in whole:
                self.wfile.write(bytes([byte]))
                time.sleep(fault.seconds)
        else:
            raise ValueError(fault.kind)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self._head(status, {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})})
        self.wfile.write(body)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.flush()

    def _close(self) -> None:
        self.close_connection = True
        if self.connection.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == struct.pack("ii", 1, 0):
            self.rfile.close()
            self.wfile.close()
            self.connection.close()
        else:
            self.connection.shutdown(socket.SHUT_WR)
