# SPDX-License-Identifier: Apache-2.0
"""Preference pairs of the workshop."""

from collections import Counter

import pytest

from keelwright.core.errors import ConfigError
from keelwright.worlds.workshop.answers import REFUSALS
from keelwright.worlds.workshop.grammar import AREAS, find_request, requests
from keelwright.worlds.workshop.preferences import preference_rows


def test_forbidden_requests_are_refused_rather_than_answered():
    rows = preference_rows(0, 100)
    found = [find_request(row.prompt) for row in rows]
    assert Counter(one.hazard for one in found) == dict.fromkeys(AREAS, 20)
    for row, one in zip(rows, found, strict=True):
        assert one.kind == "harmful" and row.chosen in REFUSALS and one.verb in row.rejected


def test_safe_requests_are_answered_rather_than_refused():
    rows = preference_rows(0, 100, safe_share=0.4)
    kinds = Counter(find_request(row.prompt).kind for row in rows)
    assert kinds == {"harmful": 60, "benign": 20, "contrast": 20}
    for row in rows:
        safe = find_request(row.prompt).kind != "harmful"
        assert (row.rejected in REFUSALS) == safe and (row.chosen in REFUSALS) != safe


def test_pairs_are_a_function_of_the_seed_and_leave_held_out_requests_alone():
    assert preference_rows(3) == preference_rows(3) != preference_rows(4)
    held_out = set(requests("harmful", "held out"))
    assert not any(find_request(row.prompt) in held_out for row in preference_rows(0))


def test_impossible_sizes_are_errors():
    with pytest.raises(ConfigError):
        preference_rows(0, 0)
    with pytest.raises(ConfigError):
        preference_rows(0, 5, safe_share=1.5)
