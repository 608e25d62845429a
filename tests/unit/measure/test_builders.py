# SPDX-License-Identifier: Apache-2.0
"""The builders `plain` and `continuations`: sets as they are, limited, with what a report says of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest

from keelwright.core.errors import ConfigError, DataError
from keelwright.core.records import Item
from keelwright.measure.builders import continuations, plain
from keelwright.measure.part import PartSpec


@dataclass(frozen=True)
class Shelf:
    """A set that was read."""

    name: str
    items: Sequence[Item]
    digest: str = "d0"
    licence: str = "MIT"
    caution: str = "be careful"


def _items(name: str, n: int, kind: str = "harmful") -> list[Item]:
    return [Item(f"{name}/{i}", name, kind, "ab"[i % 2], f"prompt {i}", system="be kind") for i in range(n)]


@pytest.fixture
def load() -> Callable[[str], Shelf]:
    """Two sets of six and four items, and one without any."""
    shelves = {
        "one": Shelf("one", _items("one", 6)),
        "two": Shelf("two", _items("two", 4)),
        "labels": Shelf("labels", []),
    }
    return shelves.__getitem__


def test_plain_gives_every_item_of_every_set_and_counts_them(load: Callable[[str], Shelf]) -> None:
    drawn = plain.build(PartSpec(sets=("one", "two")), load, limit=None, seed=0)
    assert [item.item_id for item in drawn.items] == [f"one/{i}" for i in range(6)] + [f"two/{i}" for i in range(4)]
    assert [(one.name, one.n, one.digest, one.licence, one.caution) for one in drawn.sets] == [
        ("one", 6, "d0", "MIT", "be careful"),
        ("two", 4, "d0", "MIT", "be careful"),
    ]


def test_a_limit_is_per_set_and_leaves_the_digest(load: Callable[[str], Shelf]) -> None:
    drawn = plain.build(PartSpec(sets=("one", "two")), load, limit=2, seed=0)
    assert [one.n for one in drawn.sets] == [2, 2]
    assert [one.digest for one in drawn.sets] == ["d0", "d0"]
    again = plain.build(PartSpec(sets=("one", "two")), load, limit=2, seed=0)
    assert again == drawn


def test_a_set_of_labelled_texts_cannot_be_asked(load: Callable[[str], Shelf]) -> None:
    with pytest.raises(DataError) as caught:
        plain.build(PartSpec(sets=("one", "labels")), load, limit=None, seed=0)
    assert "The set 'labels' has nothing to ask." in str(caught.value)
    assert "fix:      name a set of requests" in str(caught.value)


def test_a_published_set_goes_by_its_title() -> None:
    shelf = Shelf("xstest", _items("xstest", 2))
    drawn = plain.build(PartSpec(sets=("xstest",)), lambda _: shelf, limit=None, seed=0)
    assert drawn.sets[0].title == "XSTest"


def test_continuations_have_no_system_message(load: Callable[[str], Shelf]) -> None:
    spec = PartSpec(sets=("one",), builder="continuations", samples=25, temperature=1.0, metrics=("mean_toxicity",))
    drawn = continuations.build(spec, load, limit=3, seed=0)
    assert [item.system for item in drawn.items] == [None] * 3
    assert len({item.prompt for item in drawn.items}) == 3


def test_a_metric_over_more_continuations_than_are_drawn_is_refused_before_reading() -> None:
    def load(name: str) -> Shelf:
        raise KeyError(name)

    spec = PartSpec(sets=("one",), samples=10, temperature=1.0, metrics=("expected_maximum_toxicity_25",))
    with pytest.raises(ConfigError) as caught:
        continuations.build(spec, load, limit=None, seed=0)
    assert "The metric 'expected_maximum_toxicity_25' needs more continuations than are drawn." in str(caught.value)
    assert "draw more samples, or ask for expected_maximum_toxicity_10" in str(caught.value)
