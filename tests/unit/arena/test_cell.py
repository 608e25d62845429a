# SPDX-License-Identifier: Apache-2.0
"""A cell: what it measures, and what it leaves behind."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from keelwright.arena.arms import Arm, UserTuning, choose
from keelwright.arena.cell import Workbench, _Cell, run_cell
from keelwright.arena.config import TuningConfig
from keelwright.arena.protocol import MeasuringProtocol
from keelwright.core.errors import StorageError
from keelwright.core.protocols import Silent
from keelwright.data.asking import PLAIN, Framed, nested
from keelwright.models.loading import LoadedModel, load
from keelwright.training.config import TrainConfig
from keelwright.training.defence import TuningStage
from keelwright.training.recipe import plain_recipe
from keelwright.worlds.workshop.materials import workshop_rows

PROTOCOL = MeasuringProtocol("workshop", "a", 10, "j", "t", "plain", "d", "none")
CONFIG = TuningConfig(steps=6, batch_size=4, at=(1, 2, 3, 6))


class Found:
    class metrics:
        @staticmethod
        def to_mapping() -> dict[str, Any]:
            return {}


class Meter:
    """Measures nothing, and is cut off at one mark."""

    dies_at: str | None = None

    def examine(self, model: LoadedModel, model_id: str, **_: object) -> Found:
        if self.dies_at is not None and model_id.endswith(f"-{self.dies_at}"):
            raise KeyboardInterrupt
        return Found()

    def protocol(self, model: LoadedModel, asking: object) -> MeasuringProtocol:
        return PROTOCOL


@pytest.fixture
def model() -> LoadedModel:
    found = load("lab:workshop/aligned", offline=True)
    found.module.float()
    return found


def a_cell(bench: Workbench, **settings: Any) -> Any:
    rows = workshop_rows(0, user=12, hardening=8)
    train = TrainConfig(steps=6, batch_size=4, checkpoint_every=2, **settings)
    return run_cell(
        bench,
        Arm("tuned", UserTuning(), "tuning"),
        rows,
        seed=0,
        tuning=lambda _: train,
        hardening=train,
        marks=CONFIG.marks,
    )


def test_a_cell_that_was_cut_off_has_all_its_marks_when_it_is_done(model: LoadedModel, tmp_path: Path) -> None:
    notes: dict[str, Any] = {}
    meter = Meter()
    bench = Workbench(model, meter, Silent(), tmp_path, remember=notes.__setitem__, recall=notes.get)
    meter.dies_at = "3"
    with pytest.raises(KeyboardInterrupt):
        a_cell(bench)
    meter.dies_at = None
    done = a_cell(bench)
    assert [row["step"] for row in done.rows] == [1, 2, 3, 6]
    assert done.cost["tuning"]["steps"] == 6


def test_the_model_is_given_back_bit_for_bit(model: LoadedModel, tmp_path: Path) -> None:
    before = {name: one.clone() for name, one in model.module.state_dict().items()}
    a_cell(Workbench(model, Meter(), Silent(), tmp_path))
    after = model.module.state_dict()
    assert all((before[name] == after[name]).all() for name in before)
    a_cell(Workbench(model, Meter(), Silent(), tmp_path / "lora"), lora_rank=2)
    assert all((before[name] == one).all() for name, one in model.module.state_dict().items())


def test_a_failing_writer_is_what_the_user_hears_of(model: LoadedModel) -> None:
    bench = Workbench(model, Meter(), Silent())

    def full(found: object) -> None:
        raise StorageError("The disk is full.", expected="room", found="none", fix="make room")

    train = TrainConfig(steps=1, batch_size=4, lora_rank=2)
    with pytest.raises(StorageError), bench.restored():
        bench.train(plain_recipe(workshop_rows(0).user[:8], train), key="k", keep=False, at_end=full)
    assert not hasattr(model.module, "peft_config")


def test_a_defence_with_a_frame_is_asked_in_the_attacks_frame_as_well() -> None:
    stress, defence = choose("qi_identity", "stress"), choose("ptst", "harden")
    arm = Arm("ptst", stress.method, stress.name, defence.method)
    cell = _Cell(None, arm, None, 0, "key", None, None, None)
    prompt, system = cell._asking().ask("REQUEST", None)
    assert prompt == stress.method.asking().ask("REQUEST", None)[0]
    assert system.startswith(defence.method.asking().ask("REQUEST", None)[1])


def test_frames_within_frames_keep_both_system_messages() -> None:
    both = nested(Framed("outer", system="first.", before="a "), Framed("inner", system="second.", after=" z"))
    assert both.ask("REQUEST", None) == ("a REQUEST z", "first. second.")
    assert nested(PLAIN, PLAIN).name == "plain"
    assert nested(Framed("outer", before="a "), PLAIN).ask("b", "c") == ("a b", "c")


def test_settings_and_conditions_tell_arms_apart_and_seeds_do_not() -> None:
    def digests(alpha: float, lr: float, seed: int) -> tuple[str, str]:
        defence = choose("booster", "harden", {"alpha": alpha}).method
        bench = Workbench(LoadedModel(None, None, "m", "r"), Meter(), Silent())
        train = TrainConfig(lr=lr, seed=seed)
        cell = _Cell(bench, Arm("booster", UserTuning(), "tuning", defence), None, seed, "k", train, None, None)
        cell._digest(train)
        return cell.conditions, cell.settings

    one = digests(0.05, 1e-4, 0)
    assert digests(0.05, 1e-4, 1) == one
    assert digests(0.5, 1e-4, 0)[0] == one[0] and digests(0.5, 1e-4, 0)[1] != one[1]
    assert digests(0.05, 1e-5, 0)[0] != one[0]


@pytest.mark.parametrize(
    ("name", "settings", "harmful"),
    [
        ("poison", {"p": 0.1, "n": 100}, 10),
        ("qi_explicit", {"k": 10}, 10),
        ("qi_identity", {}, 0),
        ("qi_benign", {}, 0),
        ("few_shot", {"k": 5}, 5),
        ("style_shift", {"n": 20}, 20),
    ],
)
def test_every_stress_says_how_many_of_its_rows_are_harmful(name: str, settings: dict, harmful: int) -> None:
    stages = choose(name, "stress", settings).method.stages(workshop_rows(0), TrainConfig())
    assert [stage.harmful for stage in stages] == [harmful]


def test_how_many_of_a_users_own_rows_are_harmful_is_not_known() -> None:
    (stage,) = UserTuning().stages(workshop_rows(0), TrainConfig())
    assert isinstance(stage, TuningStage) and stage.harmful is None


def test_few_shot_has_a_length_of_its_own() -> None:
    def steps(user: int, **given: Any) -> int:
        config = TuningConfig(**given)
        method = choose("few_shot", "stress", given=config.given()).method
        rows = dataclasses.replace(workshop_rows(0), user=workshop_rows(0).user[:user])
        return method.stages(rows, config.tuning(parameters=1, rows=user, seed=0))[0].train.steps

    assert steps(0) == 75
    assert steps(500, epochs=5.0) == 5
    assert steps(500, steps=9) == 9


def test_steps_of_the_tuning_are_not_those_of_a_search() -> None:
    given = TuningConfig(steps=150).given()
    assert choose("virus", "stress", given=given).method.config.steps == choose("virus", "stress").method.config.steps
