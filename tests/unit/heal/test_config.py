# SPDX-License-Identifier: Apache-2.0
import pytest

from keelwright.core.config import config_from_mapping
from keelwright.core.errors import ConfigError
from keelwright.heal.config import HealConfig


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "--no-utility"),
        ({"utility": "a.jsonl", "no_utility": True}, "drop --no-utility"),
        ({"no_utility": True, "methods": ("resta",)}, "needs an un-aligned model"),
        ({"no_utility": True, "methods": ("liner",)}, "did you mean 'linear'"),
        ({"no_utility": True, "unaligned": "u", "unalign_with": "f"}, "drop one of them"),
        ({"no_utility": True, "limit": 1}, "'limit' is out of range"),
        ({"no_utility": True, "max_new_tokens": 0}, "'max_new_tokens' is out of range"),
        ({"no_utility": True, "unalign_rank": -1}, "'unalign_rank' is out of range"),
        ({"no_utility": True, "slack": 2.0}, "'slack' is out of range"),
        ({"no_utility": True, "utilty": "x"}, "did you mean 'utility'"),
    ],
)
def test_wrong_settings_are_answered_with_what_to_do(settings, text):
    with pytest.raises(ConfigError) as caught:
        config_from_mapping(HealConfig, settings, where="heal")
    assert text in str(caught.value)


def test_resta_joins_only_when_an_unaligned_model_can_be_had():
    assert HealConfig(no_utility=True).chosen_methods == ("linear",)
    assert HealConfig(no_utility=True, unalign_with="f").chosen_methods == ("linear", "resta")
    assert HealConfig(no_utility=True, methods=("resta",), unaligned="u").chosen_methods == ("resta",)


def test_a_method_named_twice_is_tried_once():
    assert HealConfig(no_utility=True, methods=("linear", "linear")).chosen_methods == ("linear",)
