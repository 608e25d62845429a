# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest

from keelwright.core.errors import ConfigError
from keelwright.repair.format import Format


def test_the_defaults_ask_for_nothing() -> None:
    plain = Format()
    assert not (plain.is_truncated or plain.needs_full or plain.fits_tokens)
    assert plain.seed is None
    plain.require_possible(outputs=3, dtype="F32")


def test_a_seed_counts_only_where_rounding_is_by_chance() -> None:
    assert Format(rounding_seed=5).seed is None
    assert Format(rounding="stochastic", rounding_seed=5).seed == 5


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"vocabulary": "onion"}, "'vocabulary' is not a known choice"),
        ({"rounding": "up"}, "'rounding' is not a known choice"),
        ({"pad_to_multiple_of": 0}, "'pad_to_multiple_of' is out of range"),
        ({"rounding_seed": -1}, "'rounding_seed' is out of range"),
        ({"rank": 0}, "'rank' is out of range"),
        ({"energy": 0.0}, "'energy' is out of range"),
        ({"rank": 1, "energy": 0.5}, "size of the low-rank output is not clear"),
        ({"requantize": True, "rounding": "stochastic"}, "F8 weights are rounded to nearest"),
        ({"rank": 1, "rounding": "stochastic"}, "A lower rank is for adapters"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Format(**settings)


@pytest.mark.parametrize(("outputs", "dtype"), [(2, None), (1, "BF16")])
def test_f8_is_one_output_in_its_own_dtype(outputs: int, dtype: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        Format(requantize=True).require_possible(outputs=outputs, dtype=dtype)
    assert "leave" in str(caught.value.fix)
