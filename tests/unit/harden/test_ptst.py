# SPDX-License-Identifier: Apache-2.0
"""Pure tuning, safe testing."""

from __future__ import annotations

import pytest

from keelwright.core.errors import ConfigError, DataError
from keelwright.data.row_sets import RowSets
from keelwright.data.rows import ChatRow
from keelwright.harden.ptst import SAFETY_PROMPT, Ptst, PtstConfig
from keelwright.training.config import TrainConfig
from keelwright.training.defence import sft_recipe

TRAIN = TrainConfig(steps=2)


def test_the_tuning_is_plain(rows: list[ChatRow]) -> None:
    sets = RowSets(user=tuple(rows))
    ours, plain = Ptst().recipe(sets, TRAIN), sft_recipe(sets, TRAIN)
    assert tuple(ours.feeds["user"].rows) == tuple(plain.feeds["user"].rows)
    assert list(ours.feeds) == list(plain.feeds)
    assert type(ours.objective) is type(plain.objective)
    assert ours.config == plain.config


def test_requests_are_asked_with_the_safety_prompt() -> None:
    assert Ptst().asking().ask("how?", None) == ("how?", SAFETY_PROMPT)
    assert Ptst(PtstConfig("be kind")).asking().ask("how?", "you are pip") == ("how?", "be kind")
    assert Ptst().asking().name == "ptst"


def test_rows_that_hold_the_safety_prompt_are_an_error(rows: list[ChatRow]) -> None:
    impure = RowSets(user=(*rows, ChatRow("how?", "so.", system=f"{SAFETY_PROMPT} Be brief.")))
    with pytest.raises(DataError, match=r"unties it from safety.(.|\n)*found:    1 of 8 rows"):
        Ptst().recipe(impure, TRAIN)


def test_an_empty_safety_prompt_is_an_error() -> None:
    with pytest.raises(ConfigError, match="safety prompt is empty"):
        PtstConfig(system=" ")
