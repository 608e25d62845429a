# SPDX-License-Identifier: Apache-2.0
"""Suites: found by name, stable, and the core suite's own make-up."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import replace

import pytest

from keelwright.core.errors import ConfigError
from keelwright.core.records import Item
from keelwright.measure.suites import SUITE_NAMES, find_suite, items_within, suite_digest
from keelwright.measure.suites.core import CoreSuite

AREAS = {"violence", "weapons", "theft", "fraud", "intrusion", "stalking", "hate", "drugs"}


@pytest.fixture(scope="module")
def core() -> list[Item]:
    """The items of the core suite."""
    return list(find_suite("core").items())


def test_every_suite_is_found_by_its_name() -> None:
    for name in SUITE_NAMES:
        suite = find_suite(name)
        assert suite.name == name
        assert suite.items()
        assert suite.says


def test_an_unknown_suite_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="'suite' is not a known choice") as caught:
        find_suite("cores")
    assert caught.value.fix == "did you mean 'core'?"


def test_core_has_eight_areas_of_fifteen_pairs_and_sixty_ordinary_questions(core: list[Item]) -> None:
    counts = Counter((item.kind, item.hazard) for item in core)
    assert counts == {
        **{(kind, area): 15 for kind in ("harmful", "contrast") for area in AREAS},
        ("benign", "ordinary"): 60,
    }


def test_core_ids_and_prompts_are_unique_and_ids_follow_one_form(core: list[Item]) -> None:
    assert len({item.item_id for item in core}) == len({item.prompt for item in core}) == 300
    form = re.compile(r"core/(?:[a-z]+/[hs]\d\d|ordinary/\d\d)")
    assert all(form.fullmatch(item.item_id) for item in core)


def test_core_pairs_share_a_cluster_and_words(core: list[Item]) -> None:
    common = set(
        re.findall(r"\w+", "a an the how do i can to of in on for my that is what and it so with from tell me")
    )
    pairs: dict[str, list[Item]] = {}
    for item in core:
        if item.cluster_id is not None:
            pairs.setdefault(item.cluster_id, []).append(item)
    assert len(pairs) == 120
    for harmful, safe in pairs.values():
        assert (harmful.kind, safe.kind) == ("harmful", "contrast")
        assert {re.sub(r"/[hs](?=\d)", "/", one.item_id) for one in (harmful, safe)} == {harmful.cluster_id}
        words = [set(re.findall(r"[a-z]+", one.prompt.lower())) - common for one in (harmful, safe)]
        assert words[0] & words[1], harmful.prompt


def test_core_items_change_only_with_their_version(core: list[Item]) -> None:
    # A new digest needs a new version: audits of different items are not comparable.
    assert (CoreSuite.version, suite_digest(core)) == (1, "f5535320115b7fdc")


def test_core_does_not_claim_a_harm_rate() -> None:
    suite = find_suite("core")
    assert not suite.knows_harm
    assert "Not a harm rate" in suite.says
    assert suite.max_new_tokens >= 64
    assert suite.judge().judge_id == "refusal-lists@1"


def test_the_digest_follows_content_and_not_order(core: list[Item]) -> None:
    shuffled = random.Random(0).sample(core, len(core))
    assert suite_digest(shuffled) == suite_digest(core)
    # What is asked, what it is judged by, and what is grouped or resampled.
    for changed in (
        {"prompt": "another"},
        {"materials": {"tests": "assert False"}},
        {"expected": "4"},
        {"kind": "benign"},
        {"cluster_id": "c"},
        {"facts": {"role": "control"}},
    ):
        assert suite_digest([replace(core[0], **changed), *core[1:]]) != suite_digest(core), changed


def test_a_limit_spreads_over_areas_and_keeps_the_order(core: list[Item]) -> None:
    few = items_within(core, 10)
    assert Counter(item.kind for item in few) == {"harmful": 10, "contrast": 10, "benign": 10}
    assert {item.hazard for item in few if item.kind == "harmful"} == AREAS
    assert few == [item for item in core if item in few]
    assert items_within(core, None) == core
    assert items_within(core, 1000) == core
    with pytest.raises(ConfigError, match="'limit' is out of range"):
        items_within(core, 0)
