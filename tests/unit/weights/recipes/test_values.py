# SPDX-License-Identifier: Apache-2.0
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keelwright.core.errors import ConfigError
from keelwright.weights.recipes.values import (
    OUTSIDE,
    Position,
    Rule,
    Setting,
    first_value,
    interpolate,
    read_flat_setting,
    read_setting,
)

NUMBERS = st.floats(-10, 10, allow_nan=False)
FIRST, MIDDLE, LAST = Position(0, 3), Position(1, 3), Position(2, 3)


def test_gradient_takes_the_values_of_the_sheet():
    found = [interpolate((0.0, 0.5, 1.0, 0.2), Position(layer, 8)) for layer in range(8)]
    assert found == pytest.approx([0, 0.2143, 0.4286, 0.6429, 0.8571, 0.8857, 0.5429, 0.2], abs=5e-5)


def test_outside_the_layers_the_first_value_holds_and_at_a_lone_layer_the_last():
    assert interpolate((0.1, 0.5, 0.9), OUTSIDE) == 0.1
    assert interpolate((0.1, 0.5, 0.9), Position(0, 1)) == 0.9
    assert interpolate((0.1,), Position(0, 1)) == interpolate((0.1,), OUTSIDE) == 0.1


@given(st.lists(NUMBERS, min_size=1, max_size=7), st.integers(2, 200))
def test_gradient_starts_and_ends_at_its_ends_and_stays_between_its_values(values, count):
    found = [interpolate(tuple(values), Position(index, count)) for index in range(count)]
    assert (found[0], found[-1]) == (values[0], values[-1])
    assert all(min(values) - 1e-9 <= value <= max(values) + 1e-9 for value in found)


@given(st.integers(2, 300))
def test_gradient_of_as_many_values_as_layers_gives_each_layer_its_own(count):
    values = tuple(float(index) for index in range(count))
    assert [interpolate(values, Position(index, count)) for index in range(count)] == list(values)


@pytest.mark.parametrize(("values", "count"), [((True, False), 50), (("mass", "count", "mass"), 99)])
def test_words_and_flags_change_only_where_the_depth_reaches_the_next_one(values, count):
    last = count - 1
    expected = [values[index * (len(values) - 1) // last] for index in range(count)]
    assert [interpolate(values, Position(index, count)) for index in range(count)] == expected
    assert expected[-1] == values[-1]


def test_number_in_quotes_counts_as_the_number_and_yaml_keeps_flags_apart():
    assert read_setting("t", "1e-4").at("x", OUTSIDE) == 1e-4
    assert read_setting("t", [" 1 ", 2]).at("x", Position(1, 3)) == 1.5
    assert read_setting("t", True).at("x", OUTSIDE) is True
    assert read_setting("t", 1).at("x", OUTSIDE) == 1.0


@pytest.mark.parametrize(
    ("raw", "name", "expected"),
    [
        ({"filter": "mlp", "value": 0.3}, "a.mlp.b", 0.3),
        ({"filter": "mlp", "value": 0.3}, "a.self_attn.b", None),
        ({"value": 0.3}, "a.self_attn.b", 0.3),
        ([{"filter": "*", "value": 0.1}, {"value": 0.2}], "anything", 0.1),
        ([{"filter": "mlp", "value": 0.1}, {"filter": "up", "value": 0.2}, {"value": 0.3}], "mlp.up", 0.1),
        ([{"filter": "mlp", "value": 0.1}, {"filter": "up", "value": 0.2}, {"value": 0.3}], "up", 0.2),
        ([{"filter": "mlp", "value": 0.1}, {"filter": "up", "value": 0.2}, {"value": 0.3}], "norm", 0.3),
        ([{"filter": "m.p", "value": 0.1}], "mlp", None),
        ([{"filter": "m*p", "value": 0.1}], "mlp", None),
        ([], "mlp", None),
        ([{"filter": "mlp", "value": []}, {"value": 0.3}], "mlp", None),
        ([{"filter": "mlp", "value": [0, 1]}], "mlp", 0.5),
    ],
)
def test_first_rule_that_is_part_of_the_name_wins(raw, name, expected):
    assert read_setting("t", raw).at(name, MIDDLE) == expected


@pytest.mark.parametrize(
    ("raw", "name", "expected"),
    [
        ([{"mlp": 0.3}, {"*": 0.5}], "a.mlp.b", 0.3),
        ([{"mlp": 0.3}, {"*": 0.5}], "a.norm.b", 0.5),
        ([{"model.layers.?.mlp.*": 0.3}], "model.layers.3.mlp.up.weight", 0.3),
        ([{"model.layers.?.mlp.*": 0.3}], "model.layers.13.mlp.up.weight", None),
        ([{"layers.?": 0.3}], "model.layers.3.mlp.up.weight", None),
        ([{"mlp": [0, 1]}], "mlp", 0.5),
        ([0, 1], "mlp", 0.5),
    ],
)
def test_rules_of_our_recipes_are_pairs_and_know_globs(raw, name, expected):
    assert read_flat_setting("t", raw).at(name, MIDDLE) == expected


def test_first_level_that_yields_a_value_wins_and_the_others_are_asked_in_turn():
    source = {"weight": read_setting("w", {"filter": "mlp", "value": [0, 1]})}
    slice_ = {"weight": read_setting("w", []), "density": read_setting("d", 0.5)}
    module = {"weight": read_setting("w", {"filter": "norm", "value": 7})}
    top = {"weight": read_setting("w", 9), "density": read_setting("d", 1)}
    levels = (source, slice_, module, top)
    assert first_value(levels, "weight", "mlp", LAST) == 1.0
    assert first_value(levels, "weight", "norm", LAST) == 7.0
    assert first_value(levels, "weight", "attn", LAST) == 9.0
    assert first_value(levels, "density", "attn", FIRST) == 0.5
    assert first_value(levels, "gamma", "attn", FIRST) is None


@pytest.mark.parametrize(
    "raw",
    [None, float("inf"), 10**400, [[0, 1]], [{"value": 0.1}, 0.2], {"filter": 3, "value": 1}, {"values": 1}, [0, "a"]],
)
def test_what_is_no_setting_is_refused_with_its_place(raw):
    with pytest.raises(ConfigError, match=r"^here"):
        read_setting("here", raw)


def test_zero_and_false_are_values_and_do_not_fall_through():
    top = {"t": read_setting("t", 1), "normalize": read_setting("n", True)}
    level = {"t": Setting((Rule(None, (0.0,)),)), "normalize": read_setting("n", False)}
    assert first_value((level, top), "t", "x", OUTSIDE) == 0.0
    assert first_value((level, top), "normalize", "x", OUTSIDE) is False
