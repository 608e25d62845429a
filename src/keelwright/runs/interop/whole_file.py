# SPDX-License-Identifier: Apache-2.0
"""Large files written whole or not at all, and never over another."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from keelwright.core.errors import StorageError
from keelwright.core.files import sync_folder
from keelwright.runs.places import disk_errors, require_place


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """Give a stream whose content is at `path` once the block has ended; nothing is there if it failed.

    Args:
        path: Where the file goes; parent folders are made.

    Raises:
        StorageError: Something is there already, or the disk does not take the file.
    """
    if path.exists():
        raise StorageError(
            f"The output '{path}' is there already.",
            expected="a path where nothing is yet",
            found="a folder" if path.is_dir() else "a file",
            fix="give --out another path",
        )
    require_place(path.parent, flag="--out")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        sync_folder(path.parent)
