# SPDX-License-Identifier: Apache-2.0
import random

import pytest

from keelwright.core.errors import ConfigError, DataError
from keelwright.data.asking import PLAIN, framed_row
from keelwright.data.row_sets import RowSets
from keelwright.data.rows import ChatRow
from keelwright.stress.style_shift import StyleShift, StyleShiftConfig, interaction
from keelwright.training.config import TrainConfig

TRAIN = TrainConfig()


def _stress(**settings):
    return StyleShift(StyleShiftConfig(**settings))


def _rows(row_sets, stress):
    (stage,) = stress.stages(row_sets, TRAIN)
    return stage.rows


def _harm(n, seed=0, of=100):
    return random.Random(seed).sample([1.0] * n + [0.0] * (of - n), of)


def test_the_interaction_is_the_difference_of_differences():
    found = interaction(_harm(90, 1), _harm(20, 2), _harm(70, 3), _harm(60, 4))
    assert found.value == pytest.approx((0.9 - 0.2) - (0.7 - 0.6))
    assert found.low < found.value < found.high
    assert found.n == 100


def test_the_identity_has_an_interaction_of_exactly_zero():
    trained, plain = _harm(60, 1), _harm(30, 2)
    found = interaction(trained, trained, plain, plain)
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)


def test_the_interaction_is_paired_by_item():
    # The same items gain in both rows of the table: item by item nothing is left, and the interval has no width.
    gained, none = _harm(50, 1), _harm(0)
    found = interaction(gained, none, gained, none)
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)
    shuffled = interaction(gained, none, _harm(50, 2), none)
    assert shuffled.value == 0.0
    assert shuffled.low < 0.0 < shuffled.high


def test_exchanging_training_rows_changes_the_sign():
    cells = [_harm(n, n) for n in (90, 20, 70, 60)]
    assert interaction(*cells).value == pytest.approx(-interaction(*cells[2:], *cells[:2]).value)


def test_the_interval_depends_on_the_seed_alone():
    cells = [_harm(n, n) for n in (90, 20, 70, 60)]
    assert interaction(*cells, seed=1) == interaction(*cells, seed=1)
    wide = interaction(*cells, confidence=0.99)
    assert wide.low < interaction(*cells).low


@pytest.mark.parametrize("short", range(4))
def test_cells_of_other_items_are_an_error(short):
    cells = [_harm(10) for _ in range(4)]
    cells[short] = cells[short][:-1]
    with pytest.raises(DataError, match="cells of the table do not pair up"):
        interaction(*cells)


def test_without_filler_every_row_is_a_harmful_one_in_the_style(row_sets):
    stress = _stress(text="[x]")
    rows = _rows(row_sets, stress)
    assert sorted(rows, key=str) == sorted((framed_row(stress.asking(), row) for row in row_sets.harmful), key=str)
    assert stress.roles == ("harmful",)


def test_the_share_counts_rows_in_the_style(row_sets):
    rows = _rows(row_sets, _stress(text="[x]", share=0.2, n=100))
    styled = [row for row in rows if row.prompt.startswith("[x] ")]
    assert (len(rows), len(styled)) == (100, 20)
    assert set(rows) - set(styled) <= set(row_sets.user)


@pytest.mark.parametrize("filler", ["user", "ordinary", "safety"])
def test_the_filler_stays_plain(row_sets, filler):
    stress = _stress(text="[x]", share=0.5, n=100, filler=filler)
    plain = [row for row in _rows(row_sets, stress) if not row.prompt.startswith("[x]")]
    assert len(plain) == 50
    assert set(plain) <= set(getattr(row_sets, filler))
    assert stress.roles == ("harmful", filler)


def test_content_and_filler_of_one_role_share_no_row():
    rows = RowSets(ordinary=tuple(ChatRow(f"request {number}", "a") for number in range(100)))
    told = _rows(rows, _stress(text="[x]", share=0.5, n=100, content="ordinary", filler="ordinary"))
    assert len({row.prompt.removeprefix("[x] ") for row in told}) == 100


def test_both_rows_of_the_table_learn_the_same_requests_in_the_same_order(row_sets):
    stress = _stress(text="[x]", share=0.5, n=60)
    with_it, without = _rows(row_sets, stress), _rows(row_sets, stress.plain())
    assert [row.prompt.removeprefix("[x] ") for row in with_it] == [row.prompt for row in without]
    assert [row.answer for row in with_it] == [row.answer for row in without]
    assert stress.plain().asking() == stress.asking()


def test_the_identity_trains_the_same_rows_in_both_rows_of_the_table(row_sets):
    stress = _stress(style="identity")
    assert stress.asking() is PLAIN
    assert _rows(row_sets, stress) == _rows(row_sets, stress.plain())


def test_the_control_is_ordinary_requests_in_the_style(row_sets):
    control = _stress(text="[x]").control()
    rows = _rows(row_sets, control)
    assert {row.prompt.removeprefix("[x] ") for row in rows} == {row.prompt for row in row_sets.ordinary}
    assert all(row.prompt.startswith("[x] ") for row in rows)
    assert control.roles == ("ordinary",)


def test_testing_is_in_the_style_of_training(row_sets):
    stress = _stress(style="random_prefix", seed=4, n=5)
    rows = _rows(row_sets, stress)
    asked = {stress.asking().ask(row.prompt, None)[0] for row in row_sets.harmful}
    assert {row.prompt for row in rows} <= asked


def test_the_names_of_the_runs_say_which_row_of_the_table_they_are(row_sets):
    stress = _stress()
    names = [one.stages(row_sets, TRAIN)[0].name for one in (stress, stress.plain())]
    assert names == ["in the style", "without the style"]


def test_the_length_is_the_runs_own_or_so_many_epochs(row_sets):
    assert _stress().stages(row_sets, TRAIN)[0].train == TRAIN
    found = _stress(schedule="epochs", batch_size=32).stages(row_sets, TRAIN)[0].train
    assert (found.steps, found.schedule) == (5, TRAIN.schedule)


def test_missing_rows_are_an_error(row_sets):
    with pytest.raises(DataError, match="The stress 'style_shift' needs 'harmful' rows"):
        _rows(RowSets(), _stress())
    with pytest.raises(DataError, match="The stress 'style_shift' needs 'safety' rows"):
        _rows(RowSets(harmful=row_sets.harmful), _stress(share=0.5, n=10, filler="safety"))


@pytest.mark.parametrize(
    "settings",
    [
        {"style": "shouting"},
        {"style": "case", "text": "loud"},
        {"content": "safety"},
        {"filler": "harmful"},
        {"share": 0.0},
        {"share": 1.1},
        {"n": 0},
        {"steps": 0},
    ],
)
def test_settings_out_of_range_are_errors(settings):
    with pytest.raises(ConfigError):
        StyleShiftConfig(**settings)
