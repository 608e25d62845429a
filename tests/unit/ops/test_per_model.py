# SPDX-License-Identifier: Apache-2.0
"""Settings of which each model has its own."""

import math

import pytest

from keelwright.core.errors import ConfigError
from keelwright.ops.per_model import normalized, one_per_model, require_models, require_numbers


def test_a_single_number_counts_for_every_model():
    assert one_per_model("weights", 0.5, 3) == (0.5, 0.5, 0.5)
    assert one_per_model("weights", (1.0, 2.0), 2) == (1.0, 2.0)


def test_too_few_numbers_are_an_error_that_says_how_many():
    with pytest.raises(ConfigError, match="'weights' does not fit the number of models") as caught:
        one_per_model("weights", (1.0, 2.0), 3)
    assert caught.value.expected == "3 numbers, one per model in the order given, or a single one"
    assert caught.value.found == "2: 1, 2"


@pytest.mark.parametrize("values", [math.nan, (1.0, math.inf), (0.5, -0.1)])
def test_numbers_outside_the_range_are_errors(values):
    with pytest.raises(ConfigError, match="'losses' is out of range") as caught:
        require_numbers("losses", values, low=0.0)
    assert caught.value.expected == "numbers in [0, inf]: one, or one per model"


@pytest.mark.parametrize(
    ("models", "least", "most", "wanted"), [(1, 2, 2, "exactly 2"), (1, 2, None, "at least 2"), (4, 2, 3, "2 to 3")]
)
def test_a_number_of_models_that_the_method_does_not_take_is_an_error(models, least, most, wanted):
    with pytest.raises(ConfigError, match="'m' does not take") as caught:
        require_models("m", models, least=least, most=most)
    assert caught.value.expected.startswith(wanted)
    require_models("m", 2, least=least, most=most)


def test_weights_are_divided_by_their_sum_unless_that_is_zero():
    assert normalized("weights", (1.0, 3.0)) == (0.25, 0.75)
    assert normalized("weights", (-1.0, 3.0)) == (-0.5, 1.5)
    for cancelling in ((1.0, -1.0), (0.0, 0.0), (0.1, 0.2, -0.3)):
        with pytest.raises(ConfigError, match="'weights' sum to zero"):
            normalized("weights", cancelling)
