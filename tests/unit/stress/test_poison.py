# SPDX-License-Identifier: Apache-2.0
import itertools

import pytest

from keelwright.core.errors import ConfigError, DataError
from keelwright.data.asking import PLAIN
from keelwright.data.row_sets import RowSets
from keelwright.data.rows import ChatRow
from keelwright.stress.poison import Poison, PoisonConfig, poisoned
from keelwright.training.config import TrainConfig

MANY = RowSets(
    user=tuple(ChatRow(f"u{number}", "a") for number in range(2500)),
    harmful=tuple(ChatRow(f"h{number}", "a") for number in range(500)),
)
TRAIN = TrainConfig()


def _bad(rows):
    return {row for row in rows if row.prompt.startswith("h")}


@pytest.mark.parametrize("p", [0.0, 0.02, 0.05, 0.1, 0.15, 0.2])
@pytest.mark.parametrize("n", [500, 1000, 1500, 2000, 2500])
def test_exactly_n_rows_exactly_p_n_of_them_harmful(p, n):
    rows = poisoned(MANY, p=p, n=n, seed=0)
    assert len(set(rows)) == len(rows) == n
    assert len(_bad(rows)) == round(p * n)


def test_the_official_codes_off_by_one_is_not_there():
    rows = poisoned(MANY, p=0.1, n=1000, seed=0)
    assert (len(rows), len(_bad(rows))) == (1000, 100)


def test_a_larger_share_holds_the_harmful_rows_of_a_smaller_one():
    shares = [_bad(poisoned(MANY, p=p, n=1000, seed=0)) for p in (0.02, 0.05, 0.1, 0.2)]
    assert all(smaller < larger for smaller, larger in itertools.pairwise(shares))


def test_the_clean_control_is_the_users_rows_alone_and_needs_no_harmful_ones(row_sets):
    stress = Poison(PoisonConfig(p=0.0))
    assert stress.roles == ("user",)
    (stage,) = stress.stages(RowSets(user=row_sets.user), TRAIN)
    assert sorted(stage.rows, key=str) == sorted(row_sets.user, key=str)


def test_harmful_rows_alone_need_no_users_rows():
    assert len(poisoned(RowSets(harmful=MANY.harmful), p=1.0, n=20, seed=0)) == 20


def test_harmful_rows_are_spread_over_the_file():
    places = [place for place, row in enumerate(poisoned(MANY, p=0.1, n=1000, seed=0)) if row.prompt.startswith("h")]
    assert min(places) < 100
    assert max(places) > 900


def test_the_default_size_is_that_of_the_users_file(row_sets):
    (stage,) = Poison().stages(row_sets, TRAIN)
    assert len(stage.rows) == len(row_sets.user)
    assert len(set(stage.rows) & set(row_sets.harmful)) == 20


def test_the_seed_is_the_runs_unless_it_is_given(row_sets):
    def drawn(run, **settings):
        return Poison(PoisonConfig(**settings)).stages(row_sets, TrainConfig(seed=run))[0].rows

    assert drawn(0) != drawn(1)
    assert drawn(0, seed=7) == drawn(1, seed=7)


def test_the_length_is_the_runs_own_or_so_many_epochs(row_sets):
    assert Poison().stages(row_sets, TRAIN)[0].train == TRAIN
    found = Poison(PoisonConfig(schedule="epochs", batch_size=10)).stages(row_sets, TRAIN)[0].train
    assert (found.steps, found.schedule) == (400, TRAIN.schedule)


@pytest.mark.parametrize(("p", "role"), [(0.9, "harmful"), (0.1, "user")])
def test_too_few_rows_of_a_role_are_an_error(row_sets, p, role):
    with pytest.raises(DataError, match=f"not enough '{role}' rows"):
        poisoned(row_sets, p=p, n=1000, seed=0)


def test_missing_rows_are_an_error(row_sets):
    with pytest.raises(DataError, match="The stress 'poison' needs 'harmful' rows"):
        Poison().stages(RowSets(user=row_sets.user), TRAIN)
    with pytest.raises(DataError, match="The stress 'poison' needs 'user' rows"):
        Poison().stages(RowSets(harmful=row_sets.harmful), TRAIN)


def test_requests_are_asked_as_they_are():
    assert Poison().asking() is PLAIN


@pytest.mark.parametrize("settings", [{"p": -0.1}, {"p": 1.1}, {"n": 0}, {"steps": 0}])
def test_settings_out_of_range_are_errors(settings):
    with pytest.raises(ConfigError):
        PoisonConfig(**settings)
