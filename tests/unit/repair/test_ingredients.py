# SPDX-License-Identifier: Apache-2.0
"""What repairs that learn are given."""

import pytest

from keelwright.core.errors import DataError
from keelwright.data.rows import ChatRow
from keelwright.repair.ingredients import DESCRIPTIONS, Ingredients, Prepared
from keelwright.repair.linear import Linear
from keelwright.repair.safe_delta import SafeDelta
from keelwright.repair.somf import Somf


def test_missing_rows_are_named_with_what_they_would_be(make_live):
    live = make_live()
    given = Ingredients(live.module, live.tokenizer, {}, examples=[ChatRow("a", "b")])
    given.require("examples")
    with pytest.raises(DataError, match="learns from 'safety_rows'") as caught:
        given.require("examples", "safety_rows")
    assert caught.value.expected == "harmful prompts with the refusals that are wanted"


def test_methods_that_learn_say_what_from():
    for edit in (Somf(), SafeDelta()):
        assert isinstance(edit, Prepared) and set(edit.ingredients) <= set(DESCRIPTIONS)
    assert not isinstance(Linear(), Prepared)


def test_models_and_rows_stay_out_of_the_text(make_live):
    live = make_live()
    assert "Llama" not in repr(Ingredients(live.module, live.tokenizer, {}))
