# SPDX-License-Identifier: Apache-2.0
import dataclasses
import importlib

import pytest

from keelwright.core.errors import ConfigError
from keelwright.weights.recipes.settings import METHODS, PARITY, Parameter, check_value, own_settings


def config_fields(method):
    module = importlib.import_module(f"keelwright.repair.{method}")
    config = getattr(module, "".join(part.capitalize() for part in method.split("_")) + "Config")
    return {field.name for field in dataclasses.fields(config)}


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_is_a_field_of_the_methods_config(method):
    table = METHODS[method]
    named = {one.field for one in (*table.per_model, *table.shared, *table.own)} | set(PARITY.get(method, {}))
    assert named <= config_fields(method)


@pytest.mark.parametrize("method", METHODS)
def test_our_recipes_can_set_every_field_of_the_methods_config(method):
    assert config_fields(method) == set(own_settings(method).names())


@pytest.mark.parametrize(
    ("method", "defaults"),
    [
        ("ties", {"density": 1.0, "normalize": True, "lambda": 1.0, "rescale": False}),
        ("dare_linear", {"density": 1.0, "normalize": False, "rescale": True}),
        ("breadcrumbs", {"gamma": 0.01, "normalize": False, "rescale": False}),
        ("della", {"epsilon": 0.15, "normalize": True, "rescale": True}),
        ("della_linear", {"epsilon": 0.15, "normalize": False, "rescale": True}),
        ("linear", {"normalize": True}),
        ("multislerp", {"normalize_weights": True, "eps": 1e-8}),
        ("nuslerp", {"nuslerp_flatten": True, "nuslerp_row_wise": False}),
        ("karcher", {"max_iter": 10.0, "tol": 1e-5}),
        ("sce", {"select_topk": 1.0}),
        ("ram", {"epsilon": 1e-5}),
        ("ramplus_tl", {"r": 0.1, "alpha": 0.2}),
    ],
)
def test_defaults_are_those_of_the_sheet(method, defaults):
    table = METHODS[method]
    assert {name: table.parameter(name).default for name in defaults} == defaults


@pytest.mark.parametrize(
    ("method", "name"),
    [("slerp", "t"), ("nearswap", "t"), *((one, "weight") for one in METHODS if METHODS[one].parameter("weight"))],
)
def test_what_has_no_default_is_required(method, name):
    assert METHODS[method].parameter(name).required


def test_rescale_of_a_mergekit_file_is_the_l1_form():
    rescale = METHODS["dare_ties"].parameter("rescale")
    assert check_value("r", rescale, True) == "l1"
    assert check_value("r", rescale, 0.0) == "none"


def test_whole_numbers_come_out_as_such():
    value = check_value("r", Parameter("n", "n", "integer"), 10.0)
    assert (value, type(value)) == (10, int)


@pytest.mark.parametrize("value", ["a", True, 2.0, -0.1])
def test_value_out_of_kind_or_range_is_refused(value):
    with pytest.raises(ConfigError, match="'n' has the wrong value"):
        check_value("r", Parameter("n", "n", low=0.0, high=1.0), value)
