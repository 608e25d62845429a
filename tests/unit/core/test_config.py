# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass

import pytest

from keelwright.core.config import (
    config_from_mapping,
    config_to_mapping,
    require_choice,
    require_in_range,
)
from keelwright.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SampleConfig:
    coefficient: float
    steps: int = 3
    note: str | None = None
    names: tuple[str, ...] = ()


def test_mapping_becomes_config_and_back():
    config = config_from_mapping(SampleConfig, {"coefficient": 1, "note": "a"}, where="recipe")
    assert config_to_mapping(config) == {"coefficient": 1, "steps": 3, "note": "a", "names": ()}


def test_unknown_key_is_refused_with_the_nearest_spelling():
    with pytest.raises(ConfigError) as caught:
        config_from_mapping(SampleConfig, {"coeficient": 1.0}, where="recipe.yaml")
    assert "recipe.yaml: SampleConfig has no setting 'coeficient'" in str(caught.value)
    assert "did you mean 'coefficient'?" in str(caught.value)


def test_missing_key_is_named():
    with pytest.raises(ConfigError, match="needs the setting 'coefficient'"):
        config_from_mapping(SampleConfig, {}, where="recipe")


@pytest.mark.parametrize("bad", [{"coefficient": "1"}, {"coefficient": True}, {"coefficient": 1.0, "steps": 2.5}])
def test_wrong_type_is_refused(bad):
    with pytest.raises(ConfigError, match="wrong type"):
        config_from_mapping(SampleConfig, bad, where="recipe")


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_range_refuses_outside_and_nan(value):
    with pytest.raises(ConfigError, match=r"a number in \[0, 1\]"):
        require_in_range("coefficient", value, low=0.0, high=1.0)


def test_open_end_of_a_range_is_excluded():
    require_in_range("lr", 1e-9, low=0.0, low_open=True)
    with pytest.raises(ConfigError):
        require_in_range("lr", 0.0, low=0.0, low_open=True)


def test_choice_offers_the_nearest():
    require_choice("suite", "core", ["core", "workshop"])
    with pytest.raises(ConfigError, match="did you mean 'workshop'"):
        require_choice("suite", "workshp", ["core", "workshop"])
