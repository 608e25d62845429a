# SPDX-License-Identifier: Apache-2.0
"""Rows of every role, few enough to read."""

from __future__ import annotations

import pytest

from keelwright.data.row_sets import RowSets
from keelwright.worlds.workshop.materials import workshop_rows


@pytest.fixture(scope="session")
def row_sets() -> RowSets:
    return workshop_rows(0, user=200, hardening=160)
