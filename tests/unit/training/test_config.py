# SPDX-License-Identifier: Apache-2.0
"""Settings of the training loop."""

from __future__ import annotations

import pytest

from keelwright.core.errors import ConfigError
from keelwright.training.config import TrainConfig, learning_rate


@pytest.mark.parametrize(
    "setting",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"lr": 0.0},
        {"clip": -1.0},
        {"betas": (0.9, 1.0)},
        {"final_lr_share": 1.5},
        {"schedule": "steep"},
        {"lora_rank": -1},
        {"checkpoint_every": 0},
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(setting: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"'{next(iter(setting))}'"):
        TrainConfig(**setting)


def test_constant_schedule_warms_up_and_stays() -> None:
    config = TrainConfig(steps=10, lr=1.0, warmup_steps=4)
    assert [learning_rate(config, step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_schedule_falls_to_the_final_share() -> None:
    config = TrainConfig(steps=12, lr=2.0, warmup_steps=2, schedule="linear", final_lr_share=0.1)
    assert learning_rate(config, 2) == 2.0
    assert learning_rate(config, 7) == pytest.approx(1.1)
    assert learning_rate(config, 12) == pytest.approx(0.2)
