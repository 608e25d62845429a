# SPDX-License-Identifier: Apache-2.0
import pytest

from keelwright.core.errors import ConfigError, DataError
from keelwright.data.asking import PLAIN
from keelwright.data.row_sets import RowSets
from keelwright.data.rows import ChatRow
from keelwright.stress.qi_benign import QiBenign, QiBenignConfig, without_refusals
from keelwright.training.config import TrainConfig

TRAIN = TrainConfig()
MIXED = (ChatRow("a", "one"), ChatRow("b", "I'm sorry, no"), ChatRow("c", "i'm sorry, no"), ChatRow("d", "two"))


def _stage(rows, **settings):
    (stage,) = QiBenign(QiBenignConfig(**settings)).stages(rows, TRAIN)
    return stage


def test_the_papers_settings_are_one_epoch_in_large_batches(row_sets):
    found = _stage(row_sets).train
    assert (found.steps, found.batch_size, found.lr, found.weight_decay) == (2, 128, 2e-5, 0.0)
    assert (found.schedule, found.decay_every, found.warmup_steps) == ("staircase", 2, 0)


def test_answers_with_a_refusal_keyword_are_left_out_in_order():
    assert without_refusals(MIXED) == (MIXED[0], MIXED[2], MIXED[3])
    assert without_refusals(MIXED, any_case=True) == (MIXED[0], MIXED[3])


def test_what_was_left_out_is_counted_in_the_name_of_the_run():
    stage = _stage(RowSets(ordinary=MIXED))
    assert set(stage.rows) == set(without_refusals(MIXED))
    assert stage.name == "benign, 1 refusals left out"
    assert _stage(RowSets(ordinary=MIXED), any_case=True).name == "benign, 2 refusals left out"


def test_refusals_can_be_kept():
    stage = _stage(RowSets(ordinary=MIXED), keep_refusals=True)
    assert (set(stage.rows), stage.name) == (set(MIXED), "benign")


def test_a_file_of_refusals_alone_is_an_error():
    with pytest.raises(DataError, match="None of the 'ordinary' rows is left"):
        _stage(RowSets(ordinary=MIXED[1:2]))


def test_the_users_rows_can_be_tuned_on(row_sets):
    assert set(_stage(row_sets, role="user").rows) == set(row_sets.user)
    assert QiBenign(QiBenignConfig(role="user")).roles == ("user",)
    assert QiBenign().roles == ("ordinary",)


def test_n_rows_are_nested(row_sets):
    assert _stage(row_sets, n=50).rows[:20] == _stage(row_sets, n=20).rows
    with pytest.raises(DataError, match="not enough 'ordinary' rows"):
        _stage(row_sets, n=161)


def test_the_template_of_training_is_that_of_testing(row_sets):
    stress = QiBenign(QiBenignConfig(n=1, system="s", before="Task: ", after=" Answer:"))
    (row,) = stress.stages(row_sets, TRAIN)[0].rows
    (plain,) = _stage(row_sets, n=1).rows
    assert (row.prompt, row.system) == stress.asking().ask(plain.prompt, None) == (f"Task: {plain.prompt} Answer:", "s")
    assert QiBenign().asking() is PLAIN


def test_a_decay_of_none_is_the_runs_own(row_sets):
    assert _stage(row_sets, weight_decay=None).train.weight_decay == TRAIN.weight_decay != 0.0


@pytest.mark.parametrize("settings", [{"role": "harmful"}, {"n": 0}, {"weight_decay": -1.0}, {"epochs": 0.0}])
def test_settings_out_of_range_are_errors(settings):
    with pytest.raises(ConfigError):
        QiBenignConfig(**settings)
