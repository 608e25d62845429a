# SPDX-License-Identifier: Apache-2.0
import pytest

from keelwright.core.errors import ConfigError, DataError
from keelwright.data.asking import PLAIN
from keelwright.data.row_sets import RowSets
from keelwright.stress.controls import POSITIVE_CONTROL, PositiveControl, PositiveControlConfig
from keelwright.training.config import TrainConfig


def test_the_control_tunes_on_harmful_rows_alone(row_sets):
    (stage,) = PositiveControl().stages(row_sets, TrainConfig(lr=1e-6, steps=1))
    assert stage.name == POSITIVE_CONTROL
    assert len(stage.rows) == PositiveControlConfig().k
    assert set(stage.rows) <= set(row_sets.harmful)
    assert PositiveControl().asking() is PLAIN


def test_the_controls_strength_is_its_own_whatever_the_run_asks_for(row_sets):
    gentle = PositiveControl().stages(row_sets, TrainConfig(lr=1e-6, steps=1, batch_size=2))[0].train
    config = PositiveControlConfig()
    assert (gentle.lr, gentle.batch_size) == (config.lr, config.batch_size)
    assert gentle.steps == 25


def test_of_fewer_rows_all_are_taken(row_sets):
    few = RowSets(harmful=row_sets.harmful[:7])
    (stage,) = PositiveControl().stages(few, TrainConfig())
    assert set(stage.rows) == set(few.harmful)


def test_the_control_needs_harmful_rows():
    with pytest.raises(DataError, match="The positive control needs 'harmful' rows"):
        PositiveControl().stages(RowSets(), TrainConfig())


@pytest.mark.parametrize("settings", [{"k": 0}, {"lr": 0.0}])
def test_settings_out_of_range_are_errors(settings):
    with pytest.raises(ConfigError):
        PositiveControlConfig(**settings)
