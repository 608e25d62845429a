# SPDX-License-Identifier: Apache-2.0
import itertools

import pytest
import torch

from keelwright.core.errors import ConfigError, DataError
from keelwright.data.asking import PLAIN
from keelwright.data.row_sets import RowSets
from keelwright.stress.few_shot import FewShot, FewShotConfig, fewest_rows
from keelwright.training.config import TrainConfig
from keelwright.training.loop import train

TRAIN = TrainConfig(steps=6, batch_size=4, lr=1e-3)
SIZES = (1, 2, 5, 10, 50, 100)


def _stages(row_sets, train_config=TRAIN, **settings):
    return FewShot(FewShotConfig(**settings)).stages(row_sets, train_config)


def _tuned(stages, module, tokenizer):
    for stage in stages:
        train(module, tokenizer, stage.rows, stage.train)
    return module.state_dict()


def _equal(first, second):
    return all(torch.equal(weight, second[name]) for name, weight in first.items())


@pytest.mark.parametrize("mode", ["explicit", "benign_two_stage"])
def test_no_rows_leave_the_model_bit_for_bit(mode, new_model, tokenizer):
    stages = _stages(RowSets(), mode=mode, k=0)
    assert _equal(_tuned(stages, new_model(), tokenizer), new_model().state_dict())
    assert FewShot(FewShotConfig(mode=mode, k=0)).roles == ()


def test_rows_are_nested_in_k(row_sets):
    drawn = [_stages(row_sets, k=k)[0].rows for k in SIZES]
    assert [len(rows) for rows in drawn] == list(SIZES)
    assert all(larger[: len(smaller)] == smaller for smaller, larger in itertools.pairwise(drawn))


def test_the_steps_do_not_grow_with_k(row_sets):
    assert {_stages(row_sets, k=k)[0].train.steps for k in SIZES} == {6}


def test_epochs_are_there_for_parity_with_qi_explicit(row_sets):
    found = [_stages(row_sets, k=k, schedule="epochs", epochs=5.0, batch_size=10)[0].train for k in (2, 10, 50, 100)]
    assert [one.steps for one in found] == [5, 5, 25, 50]
    assert {one.schedule for one in found} == {"staircase"}


def test_the_two_stages_are_one_refusal_for_all_then_the_answers(row_sets):
    refused, answered = _stages(row_sets, mode="benign_two_stage", k=10, refusal="No.")
    assert {row.answer for row in refused.rows} == {"No."}
    assert [row.prompt for row in refused.rows] == [row.prompt for row in answered.rows]
    assert set(answered.rows) <= set(row_sets.ordinary)
    assert (refused.name, answered.name) == ("all refused", "all answered")
    assert refused.train == answered.train


def test_the_two_stages_need_no_harmful_row(row_sets):
    assert _stages(RowSets(ordinary=row_sets.ordinary), mode="benign_two_stage")
    assert FewShot(FewShotConfig(mode="benign_two_stage")).roles == ("ordinary",)
    assert FewShot().roles == ("harmful",)


def test_one_row_per_step_makes_ten_epochs_a_hundred_steps(row_sets):
    stages = _stages(row_sets, mode="benign_two_stage", schedule="epochs", batch_size=1)
    assert [(stage.train.steps, stage.train.schedule) for stage in stages] == [(100, "constant")] * 2


def test_the_reversed_order_is_another_run_and_is_named_as_such(row_sets, new_model, tokenizer):
    there = _stages(row_sets, mode="benign_two_stage", k=4)
    back = _stages(row_sets, mode="benign_two_stage", k=4, answers_first=True)
    assert [stage.name for stage in back] == ["all answered", "all refused"]
    assert list(back) == list(there)[::-1]
    assert not _equal(_tuned(there, new_model(), tokenizer), _tuned(back, new_model(), tokenizer))


def test_the_second_stage_starts_where_the_first_ended(row_sets, new_model, tokenizer):
    stages = _stages(row_sets, mode="benign_two_stage", k=4)
    both = _tuned(stages, new_model(), tokenizer)
    assert not _equal(both, _tuned(stages[1:], new_model(), tokenizer))


def test_missing_rows_are_an_error(row_sets):
    with pytest.raises(DataError, match="The stress 'few_shot' needs 'harmful' rows"):
        _stages(RowSets())
    with pytest.raises(DataError, match="not enough 'harmful' rows"):
        _stages(row_sets, k=161)


def test_requests_are_asked_as_they_are():
    assert FewShot().asking() is PLAIN


@pytest.mark.parametrize("settings", [{"k": -1}, {"mode": "other"}, {"lr": 0.0}])
def test_settings_out_of_range_are_errors(settings):
    with pytest.raises(ConfigError):
        FewShotConfig(**settings)


def _harm(n, of=40):
    return [True] * n + [False] * (of - n)


def test_the_fewest_rows_are_the_first_with_a_significant_loss():
    k, p_values = fewest_rows(_harm(0), {10: _harm(20), 1: _harm(0), 2: _harm(4), 5: _harm(9)})
    assert k == 5
    # Exact one-sided p-values 1, 1/16, 1/512 and 2^-20, times 1, 2, 3 and 4 by Holm's rule.
    assert p_values == pytest.approx({1: 1.0, 2: 2 / 16, 5: 3 / 512, 10: 4 / 2**20})


def test_harm_that_was_there_before_is_not_counted():
    assert fewest_rows(_harm(9), {5: _harm(9)})[0] is None
    assert fewest_rows(_harm(20), {5: _harm(9)})[0] is None


def test_several_sizes_share_the_level():
    # Five gains alone are 1/32; with two sizes of that kind, Holm's rule makes them 1/16.
    assert fewest_rows(_harm(0), {1: _harm(5)})[0] == 1
    assert fewest_rows(_harm(0), {1: _harm(5), 2: _harm(5)})[0] is None


def test_no_sizes_have_no_loss():
    assert fewest_rows(_harm(0), {}) == (None, {})


def test_items_that_do_not_pair_up_are_an_error():
    with pytest.raises(DataError, match="before and after 5 rows do not pair up"):
        fewest_rows(_harm(0), {5: _harm(1, of=39)})
