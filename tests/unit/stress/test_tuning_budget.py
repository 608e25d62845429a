# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass

import pytest

from keelwright.core.errors import ConfigError
from keelwright.data.rows import ChatRow
from keelwright.stress.tuning_budget import budgeted, mixed, require_budget
from keelwright.training.config import TrainConfig, learning_rate

TRAIN = TrainConfig(steps=75, batch_size=20, lr=1.5e-4, schedule="linear", warmup_steps=5, seed=3, lora_rank=4)


@dataclass
class Settings:
    schedule: str = "epochs"
    epochs: float = 5.0
    steps: int | None = None
    lr: float | None = None
    batch_size: int | None = None


def test_settings_that_are_none_are_the_runs_own():
    assert budgeted(TRAIN, Settings("steps"), 100) == TRAIN


def test_settings_that_are_given_replace_the_runs():
    found = budgeted(TRAIN, Settings("steps", steps=9, lr=1e-3, batch_size=4), 100)
    assert (found.steps, found.lr, found.batch_size) == (9, 1e-3, 4)
    assert (found.schedule, found.warmup_steps, found.seed, found.lora_rank) == ("linear", 5, 3, 4)


@pytest.mark.parametrize(("rows", "steps"), [(10, 5), (50, 25), (100, 50), (25, 13)])
def test_epochs_are_counted_in_steps(rows, steps):
    assert budgeted(TRAIN, Settings(batch_size=10), rows).steps == steps


@pytest.mark.parametrize(("schedule", "steps"), [("epochs", 5), ("steps", 75)])
def test_a_batch_is_never_larger_than_the_rows(schedule, steps):
    found = budgeted(TRAIN, Settings(schedule, batch_size=10), 2)
    assert (found.batch_size, found.steps) == (2, steps)


def test_a_step_is_not_split_into_more_parts_than_it_has_rows():
    train = TrainConfig(batch_size=20, accumulate=8)
    assert budgeted(train, Settings("steps"), 3).accumulate == 3


def test_without_stairs_an_epoch_run_keeps_the_schedule():
    found = budgeted(TRAIN, Settings(batch_size=10), 100)
    assert (found.schedule, found.warmup_steps) == ("linear", 5)


def test_stairs_fall_after_every_epoch_and_have_no_warm_up():
    found = budgeted(TRAIN, Settings(lr=1.0, batch_size=10), 25, stairs=True)
    assert found.warmup_steps == 0
    # 25 rows in batches of 10 are three steps; the rows that a defence adds do not lengthen a stair.
    rates = [learning_rate(found, step, rows=9999) for step in range(7)]
    assert rates == pytest.approx([1.0, 1.0, 1.0, 0.85, 0.85, 0.85, 0.7225])


def test_stairs_are_of_epochs_only():
    assert budgeted(TRAIN, Settings("steps"), 100, stairs=True) == TRAIN


@pytest.mark.parametrize(
    "settings",
    [{"schedule": "days"}, {"epochs": 0.0}, {"steps": 0}, {"batch_size": 0}, {"lr": 0.0}],
)
def test_settings_out_of_range_are_errors(settings):
    with pytest.raises(ConfigError):
        require_budget(Settings(**settings))


def test_mixing_keeps_every_row_and_changes_the_order():
    rows = [ChatRow(str(number), "a") for number in range(30)]
    assert sorted(mixed(rows, seed=0), key=lambda row: int(row.prompt)) == rows
    assert list(mixed(rows, seed=0)) != rows
    assert mixed(rows, seed=0) == mixed(rows, seed=0) != mixed(rows, seed=1)
