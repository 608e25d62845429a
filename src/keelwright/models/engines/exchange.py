# SPDX-License-Identifier: Apache-2.0
"""Requests to one server: paced, bounded in time, and repeated where another attempt may succeed.

Repeated: dropped connections, time-outs, 408, 409, 425, 429, 5xx, and replies that are cut off or no answer at all. Not
repeated: every other refusal. Redirections are refusals, so that neither key nor prompts reach another host.
"""

from __future__ import annotations

import asyncio
import datetime
import importlib.util
import random
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

from keelwright.core.errors import MissingError
from keelwright.core.version import __version__
from keelwright.models.engines.pacing import Pacer, backoff, retry_after
from keelwright.models.engines.replies import Malformed, Why, why_refused, words_of
from keelwright.models.engines.usage import Tally

T = TypeVar("T")
_AGAIN = {408, 409, 425, 429}
_CONNECT_S = 10.0
_LONGEST_PAUSE_S = 300.0
_WORTH_SAYING_S = 10.0


class Refused(Exception):
    """The server refused a request, and would again.

    Args:
        why: The kind of refusal.
        status: Of the reply.
        words: The server's own, without secrets.
    """

    def __init__(self, why: Why, status: int, words: str) -> None:
        super().__init__(f"HTTP {status}: {words}")
        self.why = why
        self.words = str(self)


class Unanswered(Exception):
    """No attempt came to an answer.

    Args:
        reason: Of the last attempt, in two or three words.
        words: What it ran into.
    """

    def __init__(self, reason: str, words: str) -> None:
        super().__init__(words)
        self.reason = reason
        self.words = words


@dataclass(frozen=True, slots=True)
class Line:
    """How a server is reached, and how patiently."""

    url: str
    """Without a slash at the end."""
    key: str | None = field(repr=False)
    is_local: bool
    """A server on this machine is asked without the environment's proxies."""
    concurrency: int
    timeout_s: float
    retries: int
    backoff_s: float


class Exchange:
    """An open client: an asynchronous context manager.

    Args:
        line: The server.
        pacer: Holds requests back.
        tally: Counts attempts.
        tell: Takes one line worth reading.
    """

    def __init__(self, line: Line, pacer: Pacer, tally: Tally, tell: Callable[[str], None]) -> None:
        import httpx2

        self._line, self._pacer, self._tally, self._tell = line, pacer, tally, tell
        self._client = httpx2.AsyncClient(
            headers={
                "User-Agent": f"keelwright/{__version__}",
                **({"Authorization": f"Bearer {line.key}"} if line.key else {}),
            },
            timeout=httpx2.Timeout(line.timeout_s, connect=min(line.timeout_s, _CONNECT_S)),
            limits=httpx2.Limits(max_connections=line.concurrency),
            # Loading the trusted certificates takes longer than many a request; without TLS none is asked for.
            verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if line.is_local and line.url.startswith("http:") else True,
            trust_env=not line.is_local,
            follow_redirects=False,
        )

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._client.__aexit__(*error)

    async def ask(
        self,
        path: str,
        read: Callable[[bytes], T],
        *,
        body: Mapping[str, Any] | None = None,
        tokens: float = 0.0,
        hide: Mapping[str, str] | None = None,
    ) -> T:
        """Return what `read` makes of the reply.

        Args:
            path: Below the server's address.
            read: Raises `Malformed` where the reply is none.
            body: Sent as JSON; None asks without one.
            tokens: About how many the request takes, for the rate.
            hide: Texts that errors must not repeat, and what stands for each.

        Raises:
            Refused: Another attempt would be refused too.
            Unanswered: All attempts failed.
            MissingError: The server asks for a pause that is too long to wait.
        """
        secrets = {**({self._line.key: "<key>"} if self._line.key else {}), **(hide or {})}
        attempt = 0
        while True:
            await self._pacer.wait(tokens)
            self._tally.requests += 1
            try:
                return await self._once(path, read, body, secrets)
            except _Failed as failed:
                if attempt == self._line.retries:
                    raise Unanswered(failed.reason, failed.words) from failed
                self._tally.retries[failed.reason] += 1
                seconds = self._wait_after(failed, attempt)
            await asyncio.sleep(seconds)
            attempt += 1

    async def _once(
        self, path: str, read: Callable[[bytes], T], body: Mapping[str, Any] | None, secrets: Mapping[str, str]
    ) -> T:
        import httpx2

        url = f"{self._line.url}/{path}"
        try:
            # The library's own limits hold per read: a reply that trickles would never end.
            async with asyncio.timeout(self._line.timeout_s):
                reply = await (self._client.get(url) if body is None else self._client.post(url, json=body))
        except (TimeoutError, httpx2.TimeoutException) as error:
            raise _Failed("time-out", f"no whole reply within {self._line.timeout_s:g} s") from error
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            raise _Failed("connection", f"{type(error).__name__}: {error}") from error
        if reply.status_code < 300:
            try:
                return read(reply.content)
            except Malformed as error:
                raise _Failed("malformed reply", str(error)) from error
        words = words_of(reply.content, hide=secrets)
        why = why_refused(reply.status_code, reply.content)
        if why is Why.QUOTA or not (reply.status_code in _AGAIN or reply.status_code >= 500):
            raise Refused(why, reply.status_code, words)
        reason = "asked too often" if reply.status_code == 429 else "server error"
        wait = retry_after(reply.headers.get("Retry-After"), now=datetime.datetime.now(datetime.UTC))
        raise _Failed(reason, f"HTTP {reply.status_code}: {words}", wait)

    def _wait_after(self, failed: _Failed, attempt: int) -> float:
        # Jitter keeps clients apart; it decides no answer, so it has no seed.
        seconds = backoff(attempt, base_s=self._line.backoff_s, draw=random.random())
        if failed.wait_s is None:
            return seconds
        if failed.wait_s > _LONGEST_PAUSE_S:
            raise MissingError(
                f"The server at {self._line.url} asks for a pause of {failed.wait_s / 60:.0f} minutes.",
                expected=f"at most {_LONGEST_PAUSE_S / 60:.0f} minutes between two attempts",
                found=failed.words,
                fix="run the same command later; answers that are there are kept",
            )
        if failed.wait_s >= _WORTH_SAYING_S:
            self._tell(f"The server asks for a pause of {failed.wait_s:.0f} s.")
        self._pacer.pause(failed.wait_s)
        # The pause holds for every request; the jitter spreads them afterwards.
        return seconds


class _Failed(Exception):
    """One attempt failed, and another may succeed."""

    def __init__(self, reason: str, words: str, wait_s: float | None = None) -> None:
        super().__init__(words)
        self.reason, self.words, self.wait_s = reason, words, wait_s


def require_http_library() -> None:
    """Raise `MissingError` unless the HTTP client library is installed."""
    if importlib.util.find_spec("httpx2") is None:
        raise MissingError(
            "Asking a server needs a package that is not installed.",
            expected="httpx2",
            found="no such package",
            fix="pip install 'keelwright[serve]'",
        )
