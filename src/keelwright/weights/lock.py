# SPDX-License-Identifier: Apache-2.0
"""`merge.lock.json`: what was made from what, by which program, with the digest of every file; and its check."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from keelwright.core.digests import file_digest
from keelwright.core.errors import DataError, MissingError
from keelwright.core.version import __version__
from keelwright.models.folders import read_json, require_inside
from keelwright.weights.card import Provenance
from keelwright.weights.numerics import ROUNDING

LOCK_FILE = "merge.lock.json"


def lock_text(
    provenance: Provenance,
    sources: Mapping[str, Mapping[str, str]],
    *,
    plan_digest: str,
    files: Mapping[str, str],
    facts: Mapping[str, Any],
    rounding: str = ROUNDING,
) -> str:
    """Return the text of the lock file.

    Args:
        provenance: Method, coefficients, seed.
        sources: `{"model", "digest"}` by role.
        plan_digest: Digest of edit, settings, layout and inputs.
        files: SHA-256 by file name.
        facts: Tensors, bytes, seconds, notes.
        rounding: How values were rounded.
    """
    packages = ("torch", "safetensors", "transformers", "peft")
    document = {
        "schema": 1,
        "method": provenance.method,
        "status": provenance.status,
        "coefficients": dict(provenance.coefficients),
        "settings": dict(provenance.settings),
        "seed": provenance.seed,
        "rounding": rounding,
        "sources": {role: dict(source) for role, source in sources.items()},
        "plan": plan_digest,
        "versions": {
            "keelwright": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
        **facts,
        "files": dict(sorted(files.items())),
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def finished(folder: Path, provenance: Provenance, digests: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the lock of an output that stands there complete and is this very edit of these inputs, else None.

    Args:
        folder: Where the output would be.
        provenance: The edit.
        digests: Content digests of its sources by role.
    """
    if not (folder / LOCK_FILE).is_file():
        return None
    lock = read_json(folder / LOCK_FILE, str(folder))
    known = {role: source.get("digest") for role, source in lock.get("sources", {}).items()}
    wanted = json.loads(json.dumps(dict(provenance.settings)))
    same = lock.get("method") == provenance.method and lock.get("settings") == wanted
    if not same or any(known.get(role) != digest for role, digest in digests.items()):
        return None
    return lock


def verify(folder: Path) -> dict[str, Any]:
    """Read every file of an output again and compare its SHA-256 with the lock file.

    Args:
        folder: A folder that keelwright wrote.

    Returns:
        `{"schema", "command", "folder", "files", "bytes"}`: how many files and bytes were found unchanged.

    Raises:
        MissingError: There is no lock file, or a file that it lists is gone.
        DataError: A file has changed since it was written.
        UnsafeInputError: The lock file names a file outside the folder.
    """
    lock = folder / LOCK_FILE
    if not lock.is_file():
        raise MissingError(
            f"'{folder}' has no {LOCK_FILE}.",
            expected="a folder that keelwright wrote",
            found="no record of its digests",
            fix="check the path; other folders cannot be verified",
        )
    files = read_json(lock, str(folder)).get("files")
    if not isinstance(files, dict) or not files:
        raise DataError(
            f"'{lock}' lists no files.",
            expected="a map from file name to SHA-256",
            found=type(files).__name__,
            fix="write the output again",
        )
    total = 0
    for name, expected in files.items():
        require_inside(name, lock)
        path = folder / name
        if not path.is_file():
            raise MissingError(
                f"'{folder}' lacks '{name}', which its lock file lists.",
                expected=f"{len(files)} files",
                found=f"no '{name}'",
                fix="copy the file again, or write the output again",
            )
        found = file_digest(path)
        if found != expected:
            raise DataError(
                f"'{path}' has changed since it was written.",
                expected=f"SHA-256 {expected}",
                found=f"SHA-256 {found}",
                fix="copy the file again, or write the output again",
            )
        total += path.stat().st_size
    return {"schema": 1, "command": "weights verify", "folder": str(folder), "files": len(files), "bytes": total}
