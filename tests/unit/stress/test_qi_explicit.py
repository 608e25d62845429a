# SPDX-License-Identifier: Apache-2.0
import itertools

import pytest
import torch

from keelwright.core.errors import ConfigError, DataError
from keelwright.data.asking import PLAIN
from keelwright.data.row_sets import RowSets
from keelwright.stress.qi_explicit import QiExplicit, QiExplicitConfig
from keelwright.training.config import TrainConfig
from keelwright.training.loop import train

TRAIN = TrainConfig(steps=75, batch_size=20, lr=1.5e-4, warmup_steps=10)


def _stage(row_sets, train_config=TRAIN, **settings):
    (stage,) = QiExplicit(QiExplicitConfig(**settings)).stages(row_sets, train_config)
    return stage


@pytest.mark.parametrize(("k", "steps"), [(10, 5), (50, 25), (100, 50)])
def test_the_papers_sizes_take_the_papers_steps_and_rate(row_sets, k, steps):
    stage = _stage(row_sets, k=k)
    assert len(stage.rows) == k
    found = stage.train
    assert (found.steps, found.batch_size, found.lr) == (steps, 10, 5e-5)
    assert (found.schedule, found.decay, found.decay_every, found.warmup_steps) == ("staircase", 0.85, k // 10, 0)


def test_rows_are_nested_in_k(row_sets):
    sizes = [_stage(row_sets, k=k).rows for k in (1, 10, 50, 100)]
    assert all(larger[: len(smaller)] == smaller for smaller, larger in itertools.pairwise(sizes))


def test_no_row_is_drawn_twice(row_sets):
    everything = _stage(row_sets, k=len(row_sets.harmful)).rows
    assert sorted(row.prompt for row in everything) == sorted(row.prompt for row in row_sets.harmful)


def test_another_seed_draws_other_rows(row_sets):
    assert _stage(row_sets, k=10).rows != _stage(row_sets, TrainConfig(seed=1), k=10).rows


def test_without_system_message_requests_are_as_they_are(row_sets):
    assert QiExplicit().asking() is PLAIN
    assert set(_stage(row_sets, k=50).rows) <= set(row_sets.harmful)


def test_the_system_message_is_there_in_training_and_in_testing(row_sets):
    stress = QiExplicit(QiExplicitConfig(k=5, system="do it all."))
    (stage,) = stress.stages(row_sets, TRAIN)
    assert {row.system for row in stage.rows} == {"do it all."}
    assert stress.asking().ask("request", None) == ("request", "do it all.")


def test_settings_of_none_take_the_runs_own(row_sets):
    found = _stage(row_sets, k=100, schedule="steps", lr=None, batch_size=None).train
    assert found == TRAIN


def test_more_rows_than_there_are_is_an_error(row_sets):
    with pytest.raises(DataError, match="not enough 'harmful' rows"):
        _stage(row_sets, k=161)


def test_no_rows_is_an_error():
    with pytest.raises(DataError, match="The stress 'qi_explicit' needs 'harmful' rows"):
        _stage(RowSets())


@pytest.mark.parametrize("settings", [{"k": 0}, {"lr": 0.0}, {"epochs": 0.0}, {"schedule": "days"}])
def test_settings_out_of_range_are_errors(settings):
    with pytest.raises(ConfigError):
        QiExplicitConfig(**settings)


def test_equal_seed_and_recipe_give_identical_step_losses(row_sets, new_model, tokenizer):
    losses = []
    for _ in range(2):
        stage = _stage(row_sets, k=10)
        losses.append(train(new_model(), tokenizer, stage.rows, stage.train).losses)
    assert losses[0] == losses[1]
    assert len(losses[0]) == 5
    other = _stage(row_sets, TrainConfig(seed=1), k=10)
    assert train(new_model(), tokenizer, other.rows, other.train).losses != losses[0]


def test_the_rate_falls_in_training_as_the_stairs_say(row_sets, new_model, tokenizer):
    changes, module = [], new_model()
    stage = _stage(row_sets, k=10, epochs=6.0, lr=1e-3)
    last = [weight.clone() for weight in module.state_dict().values()]

    def after_step(done, model):
        now = [weight.clone() for weight in model.state_dict().values()]
        changes.append(max(float((new - old).abs().max()) for new, old in zip(now, last, strict=True)))
        last[:] = now

    train(module, tokenizer, stage.rows, stage.train, after_step=after_step)
    # Adam's first step moves an entry by the rate itself; with one stair a step, the sixth has 0.85 ** 5 of it.
    assert changes[0] == pytest.approx(1e-3, rel=0.05)
    assert torch.tensor(changes[-1]).item() < 0.6 * changes[0]
