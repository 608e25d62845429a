# SPDX-License-Identifier: Apache-2.0
"""Asynchronous work under a synchronous call: an event loop in a thread of its own, its results in the caller's.

The caller may itself run inside an event loop (a notebook does), and what it does with a result, such as judging it,
must not hold up the requests on their way.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def stream(work: Callable[[Callable[[T], None]], Coroutine[Any, Any, None]]) -> Generator[list[T], None, None]:
    """Yield what the work hands over, all that is there at a time; stop the work when the iteration is closed.

    Args:
        work: Takes the function that hands a result over, and runs in an event loop of its own.

    Raises:
        Exception: What the work raised, after everything that it handed over before.
    """
    end = object()
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    begun: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[None]]] = Future()

    async def run() -> None:
        task = asyncio.current_task()
        if task is not None:
            begun.set_result((asyncio.get_running_loop(), task))
        await work(waiting.put)

    with ThreadPoolExecutor(1, thread_name_prefix="keelwright-requests") as pool:
        done = pool.submit(lambda: asyncio.run(run()))
        done.add_done_callback(lambda _: waiting.put(end))
        try:
            while True:
                pieces = [waiting.get()]
                while not waiting.empty():
                    pieces.append(waiting.get())
                if pieces[-1] is end:
                    if pieces[:-1]:
                        yield pieces[:-1]
                    break
                yield pieces
        finally:
            if not done.done():
                loop, task = begun.result()
                # The loop may end by itself in between.
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(task.cancel)
        done.result()
