# SPDX-License-Identifier: Apache-2.0
"""Durable small files: written whole or not at all, with storage failures named."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from keelwright.core.errors import StorageError

_FULL = {errno.ENOSPC, errno.EDQUOT}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's complaints about `path` into a `StorageError` that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageError(
                f"The disk that holds '{path}' is full.",
                expected="enough free space for the output",
                found=os.strerror(error.errno or 0),
                fix="free some space and run the same command again: it resumes",
            ) from error
        if error.errno in _READ_ONLY:
            raise StorageError(
                f"'{path}' cannot be written.",
                expected="a folder that you may write to",
                found=os.strerror(error.errno or 0),
                fix="choose another folder, or change its permissions",
            ) from error
        raise


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part.

    Args:
        path: Where it goes; parent folders are made.
        content: Text (written as UTF-8) or bytes.

    Raises:
        StorageError: The disk is full or the place is read-only.
    """
    raw = content.encode() if isinstance(content, str) else content
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as stream:
                stream.write(raw)
                stream.flush()
                os.fsync(stream.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut (a no-op where the system cannot)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def require_new_folder(path: Path, *, flag: str, beside: Collection[str] = ()) -> None:
    """Raise `StorageError` when `path` exists and holds anything.

    Args:
        path: The output folder.
        flag: The option that named it, for the error text.
        beside: Names that may be there already.
    """
    if path.exists() and not path.is_dir():
        raise StorageError(
            f"The output '{path}' is a file.",
            expected="a folder that does not exist yet, or is empty",
            found="a file",
            fix=f"give {flag} another path",
        )
    names = sorted({child.name for child in path.iterdir()} - set(beside)) if path.is_dir() else []
    if names:
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise StorageError(
            f"The output folder '{path}' is not empty.",
            expected="a folder that does not exist yet, or is empty",
            found=shown,
            fix=f"give {flag} another path, or empty the folder",
        )


def flush_behind(handle: int, start: int, stop: int) -> None:
    """Let the system begin to write a range of a file to the disk, without waiting; durable only after an fsync.

    The fsync at the end of a large file then has little left to do. Does nothing where the system has no such call.
    """
    call = _sync_file_range()
    if call is not None:
        write = 2
        call(handle, start, stop - start, write)


@functools.cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    found = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if found is None:
        return None
    found.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    call: Callable[[int, int, int, int], int] = found
    return call
