# SPDX-License-Identifier: Apache-2.0
"""Content digests: what a run was given, and what it wrote."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path


def text_digest(text: str) -> str:
    """Return the first 16 hexadecimal digits of the text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def json_digest(value: object) -> str:
    """Return the digest of a JSON value, independent of key order."""
    return text_digest(json.dumps(value, sort_keys=True, ensure_ascii=False))


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
