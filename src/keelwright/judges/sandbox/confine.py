# SPDX-License-Identifier: Apache-2.0
"""What the Linux kernel offers to lock a process up, each as one function that says whether it took hold.

Four layers, each of which stands alone where another is missing: namespaces (no network, no other processes, a small
file system of its own), Landlock (no writes outside a folder), seccomp (no processes, programs, sockets or signals),
and no capabilities. All need no privilege; namespaces are often switched off in containers. Elsewhere than on Linux
every function returns False.

Source:
    Linux manual pages unshare(2), landlock(7), seccomp(2), capabilities(7); system call numbers of the kernel's tables.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from collections.abc import Sequence
from typing import Final

LINUX: Final = sys.platform.startswith("linux")
"""Whether programs can be run apart at all."""

NEW_USER: Final = 0x10000000
NEW_NETWORK: Final = 0x40000000
NEW_PROCESSES: Final = 0x20000000
NEW_MOUNTS: Final = 0x00020000
NEW_IPC: Final = 0x08000000

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 22, 36, 38
_SIGKILL: Final = 9
_MOUNT_PRIVATE: Final = (1 << 14) | (1 << 18)
_MOUNT_NO_SUID_NO_DEV: Final = 2 | 4

_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_WRITE_FILE: Final = 1 << 1
_WRITES: Final = _WRITE_FILE | sum(1 << bit for bit in range(4, 13))
"""Write, remove and make: the rights of Landlock's first version that change something."""
_WRITES_SINCE: Final = {2: 1 << 13, 3: 1 << 14}
"""By version: link and rename across folders, truncate."""
_TCP_SINCE, _SCOPES_SINCE = 4, 6

_ALLOW, _DENY, _NO_SUCH_CALL, _KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
_CLONE_THREAD: Final = 0x00010000
_LOAD, _EQUALS, _ANY_BIT, _AT_LEAST, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_X32: Final = 0x40000000

_ARCHITECTURES: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CLONE: Final = {"x86_64": 56, "aarch64": 220}
_DENIED: Final = {
    "x86_64": (
        *(57, 58, 59, 322),  # fork, vfork, execve, execveat
        *(41, 62, 200, 129, 424, 438),  # socket, kill, tkill, rt_sigqueueinfo, pidfd_send_signal, pidfd_getfd
        *(101, 310, 311, 298),  # ptrace, process_vm_readv, process_vm_writev, perf_event_open
        *(321, 323, 425),  # bpf, userfaultfd, io_uring_setup
        *(165, 166, 272, 308, 250, 248, 133, 259),  # mount, umount2, unshare, setns, keyctl, add_key, mknod, mknodat
    ),
    # The same in the same order; there is no fork, vfork or mknod.
    "aarch64": (
        *(221, 281),
        *(198, 129, 130, 138, 424, 438),
        *(117, 270, 271, 241),
        *(280, 282, 425),
        *(40, 39, 97, 268, 219, 217, 33),
    ),
}
_CLONE3: Final = 435

_libc = ctypes.CDLL(None, use_errno=True) if LINUX else None


def unshare(namespaces: int) -> bool:
    """Move this process (its children, for processes) to new namespaces, the sum of `NEW_*`; all of them or none."""
    return _libc is not None and _libc.unshare(ctypes.c_int(namespaces)) == 0


def keep_identity(uid: int, gid: int) -> bool:
    """Map one user and one group of the new user namespace to themselves."""
    try:
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{uid} {uid} 1")
        _write("/proc/self/gid_map", f"{gid} {gid} 1")
    except OSError:
        return False
    return True


def mount_scratch(folder: str, size_bytes: int) -> bool:
    """Mount an empty file system of limited size on a folder; it goes when the mount namespace goes."""
    if _libc is None:
        return False
    _libc.mount(None, b"/", None, ctypes.c_ulong(_MOUNT_PRIVATE), None)
    options = f"size={size_bytes},nr_inodes=4096,mode=0700".encode()
    flags = ctypes.c_ulong(_MOUNT_NO_SUID_NO_DEV)
    return _libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, options) == 0


def die_with_parent() -> bool:
    """Have the kernel kill this process when its parent goes."""
    return _prctl(_PR_SET_PDEATHSIG, _SIGKILL)


def adopt_orphans() -> bool:
    """Become the parent of every descendant whose own parent goes, so that none can hide from `os.wait`."""
    return _prctl(_PR_SET_SUBREAPER, 1)


def forbid_privileges() -> bool:
    """Give up all capabilities, and the gain of any by starting another program."""
    if _libc is None or not _prctl(_PR_SET_NO_NEW_PRIVS, 1):
        return False
    header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0))
    return _libc.capset(header, ctypes.create_string_buffer(struct.pack("6I", *([0] * 6)))) == 0


def forbid_writes(writable: Sequence[str]) -> bool:
    """Forbid every write outside `writable` by Landlock; TCP and signals to others too where the kernel knows how.

    Args:
        writable: Folders, and files such as `/dev/null`.
    """
    if _libc is None:
        return False
    version = int(_libc.syscall(_LANDLOCK_CREATE, None, 0, 1))
    if version < 1:
        return False
    handled = _WRITES | sum(bit for since, bit in _WRITES_SINCE.items() if version >= since)
    rights = [handled, *([0b11] if version >= _TCP_SINCE else []), *([0b11] if version >= _SCOPES_SINCE else [])]
    attributes = struct.pack(f"{len(rights)}Q", *rights)
    ruleset = int(_libc.syscall(_LANDLOCK_CREATE, attributes, len(attributes), 0))
    if ruleset < 0:
        return False
    try:
        return all(_allow_beneath(ruleset, path, handled) for path in writable) and (
            _libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0) == 0
        )
    finally:
        os.close(ruleset)


def forbid_calls() -> bool:
    """Forbid new processes (threads are allowed), other programs, sockets, signals and kernel oddities by seccomp."""
    machine = platform.machine()
    if _libc is None or machine not in _ARCHITECTURES:
        return False
    steps = [
        (_LOAD, 0, 0, 4),
        (_EQUALS, 1, 0, _ARCHITECTURES[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _DENY),
        # The C library then falls back to clone, whose flags a filter can read.
        (_EQUALS, 0, 1, _CLONE3),
        (_RETURN, 0, 0, _NO_SUCH_CALL),
    ]
    for number in _DENIED[machine]:
        steps += [(_EQUALS, 0, 1, number), (_RETURN, 0, 0, _DENY)]
    steps += [
        (_EQUALS, 0, 3, _CLONE[machine]),
        (_LOAD, 0, 0, 16),
        (_ANY_BIT, 1, 0, _CLONE_THREAD),
        (_RETURN, 0, 0, _DENY),
        (_RETURN, 0, 0, _ALLOW),
    ]
    filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(filters))
    return _libc.prctl(_PR_SET_SECCOMP, 2, ctypes.create_string_buffer(program), 0, 0) == 0


def _allow_beneath(ruleset: int, path: str, rights: int) -> bool:
    folder = os.path.isdir(path)  # noqa: PTH112 - pathlib is not worth its start-up here
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = struct.pack("=Qi", rights if folder else _WRITE_FILE, descriptor)
        return _libc is not None and _libc.syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0) == 0
    finally:
        os.close(descriptor)


def _prctl(option: int, value: int) -> bool:
    return _libc is not None and _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) == 0


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as stream:  # noqa: PTH123
        stream.write(text)
