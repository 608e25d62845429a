# SPDX-License-Identifier: Apache-2.0
"""Python's audit events as tripwires: what a program under test has no business doing ends it and names the deed.

The tripwire tells an attempt from a mistake, which the kernel's refusals cannot, and is all there is where the kernel
offers nothing. It is no barrier of its own against native code.

Source:
    PEP 578; Python's audit events table.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from typing import Any, Final

_STARTS: Final = ("os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.startfile")
_LOOKS: Final = ("gc.get_objects", "gc.get_referrers", "gc.get_referents", "sys._current_frames", "sys.settrace")
FORBIDDEN: Final[Mapping[str, str]] = {
    **dict.fromkeys((*_STARTS, "pty.spawn", "subprocess.Popen"), "another process"),
    **dict.fromkeys(("os.kill", "os.killpg", "signal.pthread_kill"), "a signal"),
    **dict.fromkeys((*_LOOKS, "sys._current_exceptions", "sys.setprofile", "sys.addaudithook"), "a look at the runner"),
}
"""What an event means, by name; `socket.*` and `ctypes.*` are added by their prefix."""

_NATIVE: Final = frozenset({"ctypes", "_ctypes", "cffi", "_cffi_backend"})
_WRITE_FLAGS: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_ENTRIES: Final[Mapping[str, tuple[tuple[int, int], ...]]] = {
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.mkdir": ((0, 2),),
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((0, 2), (1, 3)),
    "os.symlink": ((1, 2),),
}
"""Where an event's arguments hold the entry of a folder that it changes, and the folder's descriptor."""
_CONTENTS: Final[Mapping[str, tuple[tuple[int, int], ...]]] = {
    "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),),
    "os.utime": ((0, 3),),
    "os.truncate": ((0, -1),),
    "os.setxattr": ((0, -1),),
    "os.removexattr": ((0, -1),),
    "sqlite3.connect": ((0, -1),),
}
"""The same for events that follow links. -1: the event names no folder."""


def tripwire(folder: str, report: Callable[[str], None]) -> Callable[[str, tuple[Any, ...]], None]:
    """Return an audit hook that calls `report` with the deed, in a few words; `report` does not come back.

    Args:
        folder: The only folder where files may be written, without links in its path.
        report: Tells the deed and ends the process.
    """
    inside = folder + os.sep

    def outside(path: Any, base: int, *, follow: bool) -> str | None:
        """Return the place if it is outside the folder, None if it is inside or an open file."""
        if type(path) is int:
            return None
        name = os.fsdecode(path)
        if base >= 0:
            name = os.path.join(os.readlink(f"/proc/self/fd/{base}"), name)  # noqa: PTH115,PTH118 - within a hook
        if follow:
            place = os.path.realpath(name)
        else:
            parent, entry = os.path.split(os.path.abspath(name))  # noqa: PTH100 - within a hook
            place = os.path.join(os.path.realpath(parent), entry)  # noqa: PTH118 - within a hook
        return None if place == os.devnull or place.startswith(inside) else place

    def watch(event: str, args: tuple[Any, ...]) -> None:
        deed = FORBIDDEN.get(event)
        if deed is None:
            deed = _import(args) if event == "import" else _native_or_network(event, args)
        if deed is not None:
            report(f"{deed} ({event})")
        if event == "open":
            path, flags = args[0], args[2]
            if type(path) is not int and flags & _WRITE_FLAGS:
                place = outside(path, -1, follow=True)
                if place is not None:
                    report(f"a write outside its folder ({place})")
            elif type(path) is not int and _is_memory(os.fsdecode(path)):
                report("a look at the runner (memory)")
            return
        for table, follow in ((_ENTRIES, False), (_CONTENTS, True)):
            for index, base_index in table.get(event, ()):
                base = args[base_index] if base_index >= 0 else -1
                if event == "sqlite3.connect" and args[index] in (":memory:", ""):
                    continue
                place = outside(args[index], base, follow=follow)
                if place is not None:
                    report(f"a change outside its folder ({event} {place})")

    return watch


def _import(args: tuple[Any, ...]) -> str | None:
    return "native code" if args[0] in _NATIVE else None


def _native_or_network(event: str, args: tuple[Any, ...]) -> str | None:
    if event.startswith("ctypes."):
        return "native code"
    if not event.startswith("socket."):
        return None
    # An event loop talks to itself over a pair of local sockets; no address is involved.
    local = event == "socket.__new__" and args[1] in (-1, socket.AF_UNIX)
    return None if local else "the network"


def _is_memory(path: str) -> bool:
    return path.endswith("/mem") and os.path.realpath(path).startswith("/proc/")
