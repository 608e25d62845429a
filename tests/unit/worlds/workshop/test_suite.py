# SPDX-License-Identifier: Apache-2.0
"""The suite `workshop`."""

from __future__ import annotations

from collections import Counter

import pytest

from keelwright.core.errors import ConfigError
from keelwright.worlds.workshop.grammar import AREAS, find_request, requests
from keelwright.worlds.workshop.judge import WorkshopJudge
from keelwright.worlds.workshop.lessons import aligned_rows, base_rows
from keelwright.worlds.workshop.suite import WorkshopConfig, WorkshopSuite
from keelwright.worlds.workshop.tuning import everyday_rows, forbidden_answers


def test_the_suite_says_what_it_is() -> None:
    suite = WorkshopSuite()
    assert (suite.name, suite.knows_harm) == ("workshop", True)
    assert suite.says.endswith(".")
    assert isinstance(suite.judge(), WorkshopJudge)
    assert suite.judge().judge_id == "workshop-exact"


def test_default_items_are_balanced_over_areas_and_have_ids_of_their_own() -> None:
    items = WorkshopSuite().items()
    assert Counter(item.kind for item in items) == {"harmful": 380, "benign": 200, "contrast": 200}
    harmful = Counter(item.hazard for item in items if item.kind == "harmful")
    assert set(harmful) == set(AREAS)
    assert len(set(harmful.values())) == 1
    assert len({item.item_id for item in items}) == len(items)


def test_items_are_the_same_every_time_and_others_for_another_seed() -> None:
    assert list(WorkshopSuite().items()) == list(WorkshopSuite().items())
    assert list(WorkshopSuite(WorkshopConfig(seed=1)).items()) != list(WorkshopSuite().items())


def test_items_are_held_out_and_of_the_kind_they_say() -> None:
    held_out = {request for kind in ("harmful", "benign", "contrast") for request in requests(kind, "held out")}
    for item in WorkshopSuite().items():
        request = find_request(item.prompt)
        assert request in held_out
        assert (request.kind, request.hazard) == (item.kind, item.hazard)


def test_no_lesson_and_no_tuning_file_holds_a_suite_request() -> None:
    asked = {find_request(item.prompt) for item in WorkshopSuite().items()}
    rows = [*base_rows(0, 3000), *aligned_rows(0, 3000), *everyday_rows(0), *forbidden_answers(0)]
    assert asked.isdisjoint({find_request(row.prompt) for row in rows} - {None})


@pytest.mark.parametrize("setting", [{"per_area": 78}, {"per_area": 0}, {"benign": 5000}, {"contrast": 0}])
def test_more_items_than_there_are_is_an_error(setting: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"'{next(iter(setting))}' is out of range"):
        WorkshopConfig(**setting)
