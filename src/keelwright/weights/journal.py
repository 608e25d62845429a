# SPDX-License-Identifier: Apache-2.0
"""The journal of a write in progress: which tensors are on disk, and the digest of each file up to their end."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from keelwright.core.errors import StorageError
from keelwright.core.files import require_new_folder, storage_errors, write_atomic

with contextlib.suppress(ImportError):  # not on Windows
    import fcntl

PLAN_FILE = "plan.json"
JOURNAL_FILE = "progress.jsonl"

# A power cut may lose this much of the journal; a resume verifies every digest, so it only costs the time again.
_SYNC_SECONDS = 1.0


class Journal:
    """Appends finished tensors to `progress.jsonl`; survives a kill at any moment.

    Args:
        folder: The partial output folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL_FILE
        self._handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._synced = time.monotonic()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def append(self, tensor: str, sha256: str) -> None:
        """Record that a tensor's bytes are written; the digest is that of its file up to the tensor's end."""
        # The newline goes in front: a line that a kill cut short cannot swallow the next one.
        line = "\n" + json.dumps({"tensor": tensor, "sha256": sha256}, ensure_ascii=False)
        os.write(self._handle, line.encode())
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            os.fsync(self._handle)
            self._synced = time.monotonic()

    def close(self) -> None:
        """Make the journal durable and close it."""
        if self._handle >= 0:
            try:
                os.fsync(self._handle)
            finally:
                os.close(self._handle)
                self._handle = -1


def read_journal(folder: Path) -> dict[str, str]:
    """Return the digest of every tensor that an interrupted write finished; a torn last line is ignored."""
    path = folder / JOURNAL_FILE
    finished: dict[str, str] = {}
    if not path.is_file():
        return finished
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("tensor"), str) and isinstance(row.get("sha256"), str):
            finished[row["tensor"]] = row["sha256"]
    return finished


def begin(out: Path, *, digest: str, summary: dict[str, Any]) -> Path:
    """Return the partial folder of `out`, new or left by an interrupted write of the same plan.

    Args:
        out: The output folder; must not exist, or be empty.
        digest: The plan's digest.
        summary: What the plan does, for the person who finds the partial folder.

    Raises:
        StorageError: `out` is in use, cannot be made, or its partial folder belongs to another plan.
    """
    require_new_folder(out, flag="--out")
    partial = partial_folder(out)
    if not partial.exists():
        try:
            with storage_errors(partial):
                # Another process may make it at the same moment.
                partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"The folder '{partial}' cannot be made.",
                expected="a path whose parents are folders",
                found=os.strerror(error.errno or 0),
                fix="choose another output folder",
            ) from error
    found = _begun_digest(partial)
    if found is None and partial.is_dir():
        with sole_writer(partial):
            # Another process may have said it in the meantime, or be at work.
            found = _begun_digest(partial)
            if found is None and not any(partial.iterdir()):
                write_atomic(partial / PLAN_FILE, json.dumps({"digest": digest, **summary}, indent=2) + "\n")
                found = digest
    if found == digest:
        return partial
    raise StorageError(
        f"'{partial}' holds an unfinished output of another plan.",
        expected=f"the plan {digest}: same method, settings and inputs",
        found=f"the plan {found}" if found else f"files without a {PLAN_FILE}",
        fix=f"run the command that began it again, or delete '{partial}', or write to another folder",
    )


@contextlib.contextmanager
def sole_writer(partial: Path) -> Iterator[None]:
    """Hold the partial folder for this process; the hold ends with the process, however it ends.

    What a killed process left of a small file that it was writing is removed.

    Raises:
        StorageError: Another process is writing there, or has just ended what was to be written.
    """
    if "fcntl" not in globals():
        yield
        return
    # The folder itself: files in it are replaced, and a lock on one that was replaced excludes nobody.
    try:
        handle = os.open(partial, os.O_RDONLY)
    except FileNotFoundError as error:
        raise _ended(partial) from error
    try:
        if _locked(handle, partial):
            if not _leads_to(handle, partial):
                raise _ended(partial)
            for left in partial.glob(".*.part"):
                with storage_errors(partial):
                    left.unlink()
        yield
    finally:
        os.close(handle)


def _locked(handle: int, partial: Path) -> bool:
    """Take the lock; return False on a file system without locks. Most have them."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StorageError(
            f"Another process is writing '{partial}'.",
            expected="one writer for an output",
            found="a second one at work",
            fix="wait until it is done, or write to another folder",
        ) from error
    except OSError:
        return False
    return True


def _leads_to(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _ended(partial: Path) -> StorageError:
    return StorageError(
        f"'{partial}' was finished or removed by another process.",
        expected="one writer for an output",
        found="no such folder any more",
        fix="look whether the output is there; if it is not, run the same command again",
    )


def partial_folder(out: Path) -> Path:
    """Return where an output is built before it gets its name."""
    place = output_place(out)
    return place.with_name(f"{place.name}.partial")


def output_place(out: Path) -> Path:
    """Return the folder that `out` means: `.` and links have no name of their own to build beside."""
    return out if out.name not in ("", "..") and not out.is_symlink() else out.resolve()


def taken_bytes(out: Path) -> int:
    """Return how much of the disk an interrupted write of `out` has taken already."""
    sizes = (path.stat() for path in partial_folder(out).glob("*.safetensors"))
    # A file of its final size may still have holes; where the system counts no blocks, the size must do.
    return sum(min(one.st_size, getattr(one, "st_blocks", one.st_size) * 512) for one in sizes)


def _begun_digest(partial: Path) -> str | None:
    try:
        row = json.loads((partial / PLAN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return str(row["digest"]) if isinstance(row, dict) and "digest" in row else None
