# SPDX-License-Identifier: Apache-2.0
"""Places on the disk, looked at before any work: can a folder be made there, and is it in the way of another?"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from keelwright.core.errors import ConfigError, StorageError
from keelwright.core.files import storage_errors


def require_place(path: Path, *, flag: str) -> None:
    """Raise `StorageError` unless a folder can be made at `path`, or written to if it is there.

    Args:
        path: The folder; its parents need not exist.
        flag: The option that named it, for the error text.
    """
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise StorageError(
            f"The output '{path}' is a file." if path.is_file() else f"The folder '{path}' cannot be made.",
            expected="a path whose parents are folders",
            found=f"'{place}' is a file",
            fix=f"give {flag} another path",
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise StorageError(
            f"'{path}' cannot be written.",
            expected="a folder that you may write to",
            found=f"'{place}' is read-only for you",
            fix=f"give {flag} another path, or change its permissions",
        )


def require_apart(out: Path, run: Path) -> None:
    """Raise `ConfigError` when the run folder is the model's folder or lies inside it.

    The model's folder must be empty until the model is written whole.
    """
    if run.absolute().resolve().is_relative_to(out.absolute().resolve()):
        raise ConfigError(
            "The run folder lies inside the folder of the model.",
            expected="a run folder of its own: the model's folder gets its name when the model is complete",
            found=f"--run {run} and --out {out}",
            fix="give --run another path",
        )


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn every complaint of the operating system about `path` into a `StorageError`."""
    try:
        with storage_errors(path):
            yield
    except OSError as error:
        raise StorageError(
            f"'{path}' could not be written.",
            expected="a disk that takes the run's files",
            found=os.strerror(error.errno) if error.errno else str(error),
            fix="free some space, lift the limit or choose another folder, and run the same command again: it resumes",
        ) from error
