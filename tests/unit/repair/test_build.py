# SPDX-License-Identifier: Apache-2.0
import pytest

from keelwright.core.catalogue import catalogue, find_method
from keelwright.core.errors import ConfigError
from keelwright.repair.build import build_edit, coefficients_of, model_limits, settings_of, with_setting
from keelwright.repair.prepare import require_rows

REPAIRS = [line for line in catalogue().values() if line.room == "repair"]


@pytest.mark.parametrize("line", REPAIRS, ids=lambda line: line.name)
def test_every_method_is_built_from_its_defaults_or_says_what_it_needs(line):
    least, _ = model_limits(line.load())
    edit = build_edit(line, {}, models=least)
    assert edit.config == line.load().config_class()
    assert build_edit(line, settings_of(edit), models=least) == edit
    space = line.load().search_space
    if space is not None:
        assert all(
            coefficients_of(with_setting(edit, space.setting, value))[space.setting] == value for value in space.grid
        )


def test_lists_of_a_recipe_become_tuples():
    edit = build_edit(find_method("ties"), {"weight": [1.0, 0.5], "density": 0.3}, models=2)
    assert edit.config.weight == (1.0, 0.5) and edit.roles() == ("aligned", "tuned_2", "tuned")


def test_a_misspelt_setting_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'density'"):
        build_edit(find_method("ties"), {"densty": 0.3})


@pytest.mark.parametrize(("name", "models", "words"), [("slerp", 2, "1 tuned model"), ("model_stock", 1, "2 or more")])
def test_the_number_of_models_must_fit(name, models, words):
    with pytest.raises(ConfigError) as caught:
        build_edit(find_method(name), {}, models=models)
    assert words in caught.value.expected


def test_pre_post_is_another_name_of_linear():
    assert find_method("pre-post", room="repair").name == "linear"


def test_rows_must_be_those_that_the_method_reads(tmp_path):
    line = find_method("somf")
    edit = build_edit(line, {})
    with pytest.raises(ConfigError, match="learns from 'preferences'"):
        require_rows(line, edit, {})
    with pytest.raises(ConfigError, match="does not read 'examples'"):
        require_rows(line, edit, {"preferences": tmp_path, "examples": tmp_path})
    require_rows(line, edit, {"preferences": tmp_path})
