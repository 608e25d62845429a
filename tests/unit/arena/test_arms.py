# SPDX-License-Identifier: Apache-2.0
"""Methods and settings by name."""

import pytest

from keelwright.arena.arms import Arm, MoreAlignment, UserTuning, choose, settings_by_method
from keelwright.core.errors import ConfigError, DataError
from keelwright.data.row_sets import RowSets
from keelwright.data.rows import ChatRow
from keelwright.training.config import TrainConfig


def test_settings_reach_the_method_that_they_name():
    found = settings_by_method(["poison.p=0.02", "booster.alpha=0.1", "poison.n=100"], ["poison", "booster"])
    assert found == {"poison": {"p": 0.02, "n": 100}, "booster": {"alpha": 0.1}}
    assert settings_by_method(["p=0.02"], ["poison"]) == {"poison": {"p": 0.02}}


def test_a_plain_name_belongs_to_the_only_method_that_has_it():
    assert settings_by_method(["p=0.02"], ["poison", "booster"]) == {"poison": {"p": 0.02}, "booster": {}}
    assert settings_by_method(["harmful-batch=4"], ["poison", "booster"])["booster"] == {"harmful_batch": 4}


@pytest.mark.parametrize("word", ["p", "lisa.rho=1", "none=0.02"])
def test_a_word_that_is_no_setting_of_a_chosen_method_is_refused(word: str):
    with pytest.raises(ConfigError, match="not a setting of a method that is asked for"):
        settings_by_method([word], ["poison", "booster"])


def test_a_chosen_method_knows_its_settings_and_says_them():
    chosen = choose("booster", "harden", {"alpha": 0.02})
    assert chosen.method.config.alpha == 0.02
    assert chosen.label == "booster (alpha 0.02)"
    assert choose("booster", "harden").label == "booster"


def test_a_stress_is_no_defence():
    with pytest.raises(ConfigError, match="no harden method 'poison'"):
        choose("poison", "harden")


def test_an_unknown_setting_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match=r"(?s)no setting 'alfa'.*did you mean 'alpha'"):
        choose("booster", "harden", {"alfa": 1.0})


def test_a_defence_acts_before_the_stress_or_within_it():
    before, within = choose("booster", "harden").method, choose("lisa", "harden").method
    assert Arm("a", UserTuning(), "tuning", before).hardening is before
    assert Arm("a", UserTuning(), "tuning", before).tuning is None
    assert Arm("a", UserTuning(), "tuning", within).tuning is within
    assert Arm("a", UserTuning(), "tuning", within).hardening is None


def test_the_control_of_more_alignment_trains_on_the_alignment_rows():
    row = ChatRow("a", "b")
    recipe = MoreAlignment().recipe(RowSets(safety=(row,), ordinary=(row, row)), TrainConfig())
    assert {name: len(feed.rows) for name, feed in recipe.feeds.items()} == {"safety": 3}
    assert recipe.objective.feed == "safety"


def test_user_tuning_without_rows_says_which_flag_gives_them():
    with pytest.raises(DataError, match="--data FILE"):
        UserTuning().stages(RowSets(), TrainConfig())


def test_a_secret_setting_is_neither_told_nor_written_down():
    chosen = choose("backdoor_align", "harden", {"secret": 987654321, "k": 5})
    assert "987654321" not in f"{chosen.label} {chosen.public()} {chosen.method.config}"
    assert chosen.label == "backdoor_align (secret (secret), k 5)"
    other = choose("backdoor_align", "harden", {"secret": 1, "k": 5})
    assert chosen.public()["secret"] != other.public()["secret"]
    assert chosen.public()["k"] == 5


def test_settings_that_are_typed_are_read_as_they_are_written_down():
    import json

    chosen = choose("tar", "harden", {"inner_lrs": [2e-6, 2e-5], "loss": "refusal"})
    words = [f"tar.{key}={json.dumps(value)}" for key, value in chosen.told().items()]
    assert choose("tar", "harden", settings_by_method(words, ["tar"])["tar"]).method.config == chosen.method.config
    assert settings_by_method(["tar.inner_lrs=[4e-4]"], ["tar"]) == {"tar": {"inner_lrs": [4e-4]}}


def test_a_list_of_the_wrong_kind_is_refused():
    with pytest.raises(ConfigError, match="'inner_lrs' has the wrong type"):
        choose("tar", "harden", {"inner_lrs": ["fast"]})
