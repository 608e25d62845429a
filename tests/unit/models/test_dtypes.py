# SPDX-License-Identifier: Apache-2.0
"""Names of dtypes."""

from __future__ import annotations

from keelwright.models.dtypes import STORED_NAMES, TORCH_DTYPES
from keelwright.models.headers import ITEM_BYTES


def test_the_sizes_in_headers_are_those_of_torch() -> None:
    assert {name: dtype.itemsize for name, dtype in TORCH_DTYPES.items()} == {
        name: size for name, size in ITEM_BYTES.items() if name in TORCH_DTYPES
    }


def test_the_names_go_both_ways() -> None:
    assert {STORED_NAMES[dtype]: dtype for dtype in TORCH_DTYPES.values()} == TORCH_DTYPES
