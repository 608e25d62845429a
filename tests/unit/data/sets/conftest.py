# SPDX-License-Identifier: Apache-2.0
"""Rows as a reader would hand them on, and the published sets where they are shared with the tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from keelwright.data.sets.catalogue import find_set, load_set
from keelwright.data.sets.spec import LoadedSet
from keelwright.data.source_rows import SourceRow

MakeRows = Callable[..., list[SourceRow]]
Published = Callable[..., LoadedSet]


@pytest.fixture
def rows() -> MakeRows:
    """Make rows of a file called tiny.csv, the first in line 2."""

    def make(*values: Mapping[str, Any]) -> list[SourceRow]:
        return [SourceRow(one, "tiny.csv", number) for number, one in enumerate(values, 2)]

    return make


@pytest.fixture
def published() -> Published:
    """Load a set from the shared folder, or skip."""

    def load(name: str, **options: Any) -> LoadedSet:
        spec = find_set(name)
        folder = Path(os.environ.get("KEELWRIGHT_DATA", "")) / (spec.folder or spec.name)
        if "KEELWRIGHT_DATA" not in os.environ or not folder.is_dir():
            pytest.skip(f"needs the set '{name}' in KEELWRIGHT_DATA/{folder.name}")
        return load_set(name, data=folder, offline=True, **options)

    return load
