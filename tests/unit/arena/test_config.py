# SPDX-License-Identifier: Apache-2.0
"""Settings of runs that train and measure."""

import pytest

from keelwright.arena.config import FULL_TUNING_BELOW, TuningConfig
from keelwright.core.errors import ConfigError


def test_small_models_are_trained_in_full_and_large_ones_with_lora():
    small = TuningConfig().tuning(parameters=FULL_TUNING_BELOW - 1, rows=100, seed=0)
    large = TuningConfig().tuning(parameters=FULL_TUNING_BELOW, rows=100, seed=0)
    assert (small.lora_rank, small.lr) == (0, 1.5e-4)
    assert (large.lora_rank, large.lr) == (16, 1e-4)
    assert TuningConfig(lora_rank=0).tuning(parameters=FULL_TUNING_BELOW, rows=100, seed=0).lr == 2e-5


def test_steps_are_three_passes_over_the_rows_unless_said_otherwise():
    def steps(**settings: object) -> int:
        return TuningConfig(**settings).tuning(parameters=1, rows=101, seed=0).steps

    assert steps() == 16
    assert steps(epochs=1.0) == 6
    assert steps(steps=7) == 7


def test_marks_are_four_evenly_spread_and_hold_the_last_step():
    assert TuningConfig().marks(100) == (25, 50, 75, 100)
    assert TuningConfig().marks(2) == (1, 2)
    assert TuningConfig().marks(1) == (1,)
    assert TuningConfig(at=(50, 10, 400)).marks(100) == (10, 50, 100)


def test_hardening_has_settings_of_its_own():
    config = TuningConfig(harden_steps=7, harden_batch=3, lr=1e-5)
    found = config.hardening(parameters=1, seed=5)
    assert (found.steps, found.batch_size, found.lr, found.seed) == (7, 3, 3e-4, 5)
    assert TuningConfig(harden_lr=1e-3).hardening(parameters=1, seed=0).lr == 1e-3


@pytest.mark.parametrize(
    "setting",
    [{"steps": 0}, {"epochs": 0.0}, {"lr": 0.0}, {"seeds": 0}, {"at": (0,)}, {"lora_rank": -1}, {"harden_lr": 0.0}],
)
def test_a_setting_out_of_range_is_refused_by_name(setting: dict[str, object]):
    with pytest.raises(ConfigError, match=f"'{next(iter(setting))}'"):
        TuningConfig(**setting)
