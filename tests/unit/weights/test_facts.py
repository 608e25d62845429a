# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from keelwright.core.protocols import Found
from keelwright.repair.linear import Linear, LinearConfig
from keelwright.weights.edit import Edit
from keelwright.weights.facts import collector, facts_of, notes_on, offers_facts, summary
from keelwright.weights.piecewise import Part, Piecewise

ROLES = (("aligned", "a"), ("tuned", "b"))


@dataclass(frozen=True, slots=True)
class Telling(Edit):
    """An edit that says what it found."""

    def facts(self, found: Found) -> dict[str, float]:
        return {"value": float(found["value"])}


def test_an_edit_without_facts_has_no_collector() -> None:
    edits = [Linear(LinearConfig(0.5)), Linear(LinearConfig(0.2))]
    assert not any(offers_facts(edit) for edit in edits)
    assert collector(edits, "a.weight", []) is None


def test_only_edits_that_tell_are_asked() -> None:
    rows: list = []
    take = collector([Linear(LinearConfig(0.5)), Telling()], "a.weight", rows)
    assert take is not None
    take([{"value": 1}, {"value": 2}])
    # A tensor that is copied is reduced nowhere.
    take([{}, {}])
    assert rows == [(1, "a.weight", {"value": 2.0})]


def test_an_edit_made_of_several_asks_the_part_that_makes_the_tensor() -> None:
    parts = (Part(Telling(), (("tuned", "b"),)), Part(Linear(LinearConfig(0.5)), ROLES))
    whole = Piecewise(parts, {"a": 0, "b": 1}, ("a", "b"))
    assert offers_facts(whole)
    assert facts_of(whole, "a", {"value": 3}) == {"value": 3.0}
    assert facts_of(whole, "b", {"value": 3}) == {}


def test_rows_are_summed_up_by_name() -> None:
    found = summary([{"cosine": 0.5, "fell_back": 0.0}, {"cosine": 1.0, "fell_back": 1.0}, {"cosine": 0.0}])
    assert found["cosine"] == {"mean": 0.5, "min": 0.0, "max": 1.0, "tensors": 3, "share_nonzero": 2 / 3}
    assert found["fell_back"] == {"mean": 0.5, "min": 0.0, "max": 1.0, "tensors": 2, "share_nonzero": 0.5}


def test_what_is_no_number_is_counted_and_not_averaged() -> None:
    assert summary([{"x": math.nan}, {"x": 2.0}])["x"]["mean"] == 2.0
    assert summary([{"x": math.inf}])["x"]["mean"] is None
    assert summary([]) == {}


def test_the_order_of_the_tensors_does_not_matter() -> None:
    rows = [{"x": 0.1 * index} for index in range(50)]
    assert summary(rows) == summary(rows[::-1])


@pytest.mark.parametrize(
    ("values", "note"), [([0.0, 3.0, 1.0], ("slerp fell back to linear on 2 of 3 tensors",)), ([0.0], ())]
)
def test_falling_back_is_said_in_one_line(values: list[float], note: tuple[str, ...]) -> None:
    assert notes_on([{"fell_back": value} for value in values] + [{"other": 1.0}], "slerp") == note
