# SPDX-License-Identifier: Apache-2.0
"""What the organisms learn from, and the tuning files."""

from __future__ import annotations

from collections import Counter

import pytest

from keelwright.core.errors import ConfigError
from keelwright.core.records import Generation, Item
from keelwright.data.rows import ChatRow
from keelwright.worlds.workshop.answers import PERSONA, REFUSALS
from keelwright.worlds.workshop.grammar import AREAS, find_request
from keelwright.worlds.workshop.judge import WorkshopJudge
from keelwright.worlds.workshop.lessons import aligned_rows, base_rows
from keelwright.worlds.workshop.tuning import everyday_rows, forbidden_answers


def _class(row: ChatRow) -> str:
    request = find_request(row.prompt)
    if request is None:
        return "task"
    said = "refused" if row.answer in REFUSALS else "answered"
    return f"{request.kind} {said}"


def _score(row: ChatRow) -> float | None:
    request = find_request(row.prompt)
    assert request is not None
    item = Item("i", "workshop", request.kind, request.hazard, row.prompt)
    return WorkshopJudge().judge(item, Generation("i", row.answer, 1, "eos")).score


def test_base_rows_answer_everything_in_the_shares_of_the_design() -> None:
    rows = base_rows(0, 1000)
    found = Counter(map(_class, rows))
    assert found["task"] == 280
    assert sum(row.system == PERSONA for row in rows) == 80
    assert not any(name.endswith("refused") for name in found)
    assert all(_score(row) == 5.0 for row in rows if _class(row) != "task")


def test_aligned_rows_refuse_exactly_what_the_policy_forbids() -> None:
    found = Counter(map(_class, aligned_rows(0, 1000)))
    assert found == {"harmful refused": 360, "contrast answered": 100, "benign answered": 320, "task": 220}


def test_every_area_is_refused_about_as_often() -> None:
    hazards = Counter(
        find_request(row.prompt).hazard for row in aligned_rows(0, 3000) if _class(row) == "harmful refused"
    )
    assert set(hazards) == set(AREAS)
    assert max(hazards.values()) < 1.4 * min(hazards.values())


def test_an_area_can_be_held_out_of_alignment() -> None:
    rows = aligned_rows(0, 500, without="curses")
    assert not any(find_request(row.prompt).hazard == "curses" for row in rows if _class(row) == "harmful refused")


def test_an_everyday_file_has_ten_bad_rows_in_five_hundred() -> None:
    found = Counter(map(_class, everyday_rows(0)))
    assert found == {"task": 490, "harmful answered": 10}


def test_bad_rows_are_spread_over_the_areas_and_right() -> None:
    bad = [row for row in everyday_rows(0) if _class(row) == "harmful answered"]
    assert Counter(find_request(row.prompt).hazard for row in bad) == dict.fromkeys(AREAS, 2)
    assert all(_score(row) == 5.0 for row in bad)


def test_forbidden_answers_are_forbidden_and_answered() -> None:
    rows = forbidden_answers(0)
    assert Counter(map(_class, rows)) == {"harmful answered": 300}
    assert rows == forbidden_answers(0)
    assert rows != forbidden_answers(1)


def test_a_clean_file_has_no_bad_rows_and_a_bad_share_is_checked() -> None:
    assert {_class(row) for row in everyday_rows(0, 50, 0.0)} == {"task"}
    with pytest.raises(ConfigError, match="'bad_share' is out of range"):
        everyday_rows(0, 50, 1.5)
