# SPDX-License-Identifier: Apache-2.0
"""What is refused before a model is loaded."""

import pytest

from keelwright.arena.arms import Arm, choose
from keelwright.arena.checking import require_trainable
from keelwright.arena.config import TuningConfig
from keelwright.arena.job import open_job
from keelwright.arena.session import _require_apart
from keelwright.core.errors import ConfigError
from keelwright.core.protocols import Silent


def check(stress: str, defence: str, **settings: object) -> None:
    kind, shield = choose(stress, "stress"), choose(defence, "harden")
    job = open_job("lab:workshop/aligned", {}, TuningConfig(limit=4, **settings), Silent())
    require_trainable([Arm(defence, kind.method, stress, shield.method)], job)


def test_ewc_with_a_new_adapter():
    with pytest.raises(ConfigError, match="EWC cannot hold a new LoRA adapter"):
        check("poison", "ewc", lora_rank=2)


def test_a_batch_that_cannot_be_split():
    with pytest.raises(ConfigError, match="The batch of 'harmful' rows is too small to be split"):
        check("poison", "panacea", accumulate=16)


def test_a_defence_within_a_tuning_that_there_is_not():
    with pytest.raises(ConfigError, match="'abliterate' edits weights and tunes nothing"):
        check("abliterate", "lisa")


@pytest.mark.parametrize(("run", "out"), [("x", "x"), ("x/run", "x"), ("x", "x/model")])
def test_a_run_and_a_model_in_each_other(run, out, tmp_path):
    with pytest.raises(ConfigError, match="folders of their own"):
        _require_apart(tmp_path / run, tmp_path / out)


def test_a_run_and_a_model_side_by_side_are_fine(tmp_path):
    _require_apart(tmp_path / "run", tmp_path / "model")
