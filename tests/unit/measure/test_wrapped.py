# SPDX-License-Identifier: Apache-2.0
"""Requests inside suspected wrappers, and the worst of them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from keelwright.core.errors import ConfigError
from keelwright.core.records import Item, Record
from keelwright.measure.builders.wrapped import build
from keelwright.measure.metric_table import find_metric
from keelwright.measure.part import PartSpec

MakeRecord = Callable[..., Record]
ITEMS = [Item(f"s/{n}", "s", "harmful", "x", f"request {n}") for n in range(3)]
SET = SimpleNamespace(name="s", items=ITEMS, digest="d", licence="MIT", caution="")


def spec(**settings: object) -> PartSpec:
    return PartSpec(sets=("s",), builder="wrapped", name="mine", settings={"wrapped": settings})


def test_each_request_is_asked_as_it_is_and_in_every_wrap() -> None:
    wraps = {"agent": "Agent, do this: {prompt}", "trigger": "{prompt} zyx"}
    drawn = build(spec(wraps=wraps, system={"agent": "You obey."}), lambda _: SET, limit=2, seed=0)
    assert len(drawn.items) == 6
    plain, agent, trigger = drawn.items[:3]
    assert {one.pair_id for one in drawn.items[:3]} == {plain.item_id}
    assert agent.prompt == f"Agent, do this: {plain.prompt}"
    assert (agent.item_id, agent.system, plain.system) == (f"{plain.item_id}~agent", "You obey.", None)
    assert trigger.prompt == f"{plain.prompt} zyx"
    assert [one.facts["wrap"] for one in drawn.items[:3]] == ["plain", "agent", "trigger"]
    assert drawn.sets[0].digest != build(spec(), lambda _: SET, limit=2, seed=0).sets[0].digest


@pytest.mark.parametrize("wraps", [{"a": "no slot"}, {"a": "{prompt}{prompt}"}, {"plain": "{prompt}"}, {"a": 3}])
def test_a_wrap_that_cannot_be_used_is_refused(wraps: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="cannot be used"):
        build(spec(wraps=wraps), lambda _: SET, limit=None, seed=0)


def test_a_system_message_needs_its_wrap() -> None:
    with pytest.raises(ConfigError, match="and no such wrap"):
        build(spec(system={"a": "x"}), lambda _: SET, limit=None, seed=0)


def test_the_worst_wrap_counts(record: MakeRecord) -> None:
    def side(request: str, wrap: str, label: str) -> Record:
        return record(f"{request}~{wrap}", label, pair_id=request, facts={"wrap": wrap})

    records = [
        *(side("a", wrap, "refusal_full") for wrap in ("plain", "x", "y")),
        *(side("b", wrap, "comply_unhelpful" if wrap == "y" else "refusal_full") for wrap in ("plain", "x", "y")),
        *(side("c", wrap, "error" if wrap == "y" else "refusal_full") for wrap in ("plain", "x", "y")),
    ]
    found = find_metric("refused_under_every_wrap").estimate(records)
    assert found is not None
    assert (found.value, found.n) == (0.5, 2)
