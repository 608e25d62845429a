# SPDX-License-Identifier: Apache-2.0
"""The remedy `cot`: one question per profile, and the model's own list in every prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from keelwright.core.errors import ConfigError
from keelwright.core.records import Item
from keelwright.measure.mitigations import MITIGATION_NAMES, find_mitigation
from keelwright.measure.mitigations.chain_of_thought import ChainOfThought, OffLimitsWording


def _item(name: str, profile: str) -> Item:
    before, after = f"user: {profile}", f"\nquestion {name}?"
    materials = {"profile": profile, "instruction": name, "before": before, "after": after}
    return Item(name, "users", "harmful", "health", before + after, system="be kind", materials=materials)


class Model:
    """Answers with a list of its own for each profile, and remembers what it was asked."""

    def __init__(self, *lists: str) -> None:
        self.lists = lists
        self.asked: list[list[Item]] = []

    def __call__(self, items: Sequence[Item]) -> list[str]:
        self.asked.append(list(items))
        return list(self.lists[: len(items)])


ITEMS = [_item("a", "one"), _item("b", "two"), _item("c", "one"), _item("d", "one")]


def test_each_distinct_profile_is_asked_about_once() -> None:
    model = Model("first list", "second list")
    ChainOfThought().rewrite(ITEMS, model)
    assert len(model.asked) == 1
    assert len(model.asked[0]) == 2
    assert [item.system for item in model.asked[0]] == ["be kind", "be kind"]
    assert ["one" in item.prompt.split("\n")[0] for item in model.asked[0]] == [True, False]
    assert len({item.item_id for item in model.asked[0]}) == 2


def test_the_list_goes_right_after_the_profile_and_all_else_stays() -> None:
    wording = OffLimitsWording(question="{profile}?", insertion=" [{list}]")
    rewritten = ChainOfThought(wording).rewrite(ITEMS, Model(" first {list} \n", "second"))
    assert [item.prompt for item in rewritten] == [
        "user: one [first {list}]\nquestion a?",
        "user: two [second]\nquestion b?",
        "user: one [first {list}]\nquestion c?",
        "user: one [first {list}]\nquestion d?",
    ]
    assert [replace(new, prompt=old.prompt) for new, old in zip(rewritten, ITEMS, strict=True)] == ITEMS


def test_without_a_list_the_prompt_stays() -> None:
    rewritten = ChainOfThought().rewrite(ITEMS, Model("  \n", "second"))
    assert [new.prompt == old.prompt for new, old in zip(rewritten, ITEMS, strict=True)] == [True, False, True, True]


def test_nothing_is_asked_about_no_items() -> None:
    model = Model()
    assert ChainOfThought().rewrite([], model) == []
    assert model.asked == []


def test_requests_without_a_profile_are_refused_before_anything_is_asked() -> None:
    model = Model("list")
    with pytest.raises(ConfigError) as caught:
        ChainOfThought().rewrite([*ITEMS, Item("x", "xstest", "harmful", "h", "prompt")], model)
    assert "The remedy 'cot' cannot rewrite 'x'." in str(caught.value)
    assert "fix:      use it with --suite user-specific" in str(caught.value)
    assert model.asked == []


def test_remedies_are_found_by_name_and_say_what_they_do() -> None:
    for name in MITIGATION_NAMES:
        found = find_mitigation(name)
        assert found.name == name
        assert found.says.endswith(".")
    with pytest.raises(ConfigError, match="'mitigation' is not a known choice"):
        find_mitigation("cott")
