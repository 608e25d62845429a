# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from keelwright.core.errors import NumericalError
from keelwright.stress.virus_search import best_tokens, draw_swaps, search

VOCAB, LENGTH = 12, 5
LEGAL = torch.ones(VOCAB, dtype=torch.bool)
LEGAL[[0, 3, 7]] = False


class Table:
    """A value per position and token; the slope is exact."""

    def __init__(self, seed=0):
        self.values = torch.randn(LENGTH, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def exact(self, choices):
        return self.values.expand(len(choices), -1, -1).gather(2, choices[..., None]).squeeze(-1).sum(1)

    def slope(self, current, vocab):
        return self.values


class Misleading(Table):
    """Its slope points uphill."""

    def slope(self, current, vocab):
        return -self.values


START = torch.tensor([1, 2, 4, 5, 6])


def run(objective, **settings):
    wanted = {"steps": 12, "k": 4, "count": 6, "generator": torch.Generator().manual_seed(0), **settings}
    return search(objective, START, LEGAL, **wanted)


def test_candidates_are_legal_new_and_the_steepest():
    slope = Table().values
    tokens, there = best_tokens(slope, START, LEGAL, 4)
    assert there.all()
    for position in range(LENGTH):
        allowed = [index for index in range(VOCAB) if LEGAL[index] and index != START[position]]
        wanted = sorted(allowed, key=lambda index: slope[position, index].item())[:4]
        assert tokens[position].tolist() == wanted


def test_where_few_tokens_are_legal_no_illegal_one_is_drawn():
    few = torch.zeros(VOCAB, dtype=torch.bool)
    few[[1, 2]] = True
    tokens, there = best_tokens(Table().values, START, few, 8)
    drawn = draw_swaps(START, tokens, there, count=100, generator=torch.Generator().manual_seed(0))
    assert len(drawn) == 1 + 1 + 2 + 2 + 2
    changed = drawn != START
    assert set(drawn[changed].tolist()) <= {1, 2}


def test_swaps_are_different_and_differ_from_the_current_tokens_in_one_position():
    tokens, there = best_tokens(Table().values, START, LEGAL, 4)
    drawn = draw_swaps(START, tokens, there, count=15, generator=torch.Generator().manual_seed(0))
    assert len(drawn) == 15
    assert ((drawn != START).sum(1) == 1).all()
    assert len({tuple(one) for one in drawn.tolist()}) == 15
    assert LEGAL[drawn[drawn != START]].all()


@pytest.mark.parametrize("objective", [Table(0), Table(1), Misleading(0)])
def test_the_best_value_never_rises_and_is_that_of_the_tokens(objective):
    found = run(objective)
    assert len(found.values) == 13
    assert all(after <= before for before, after in zip(found.values, found.values[1:], strict=False))
    assert float(objective.exact(found.ids[None])[0]) == found.values[-1]
    assert found.evaluated == 1 + 12 * 6


def test_enough_steps_reach_the_minimum_of_a_sum_over_positions():
    objective = Table()
    found = run(objective, steps=40, k=VOCAB, count=40)
    allowed = objective.values.masked_fill(~LEGAL, torch.inf)
    best = torch.minimum(allowed.min(1).values, objective.values[torch.arange(LENGTH), START])
    assert found.values[-1] == pytest.approx(float(best.sum()))


def test_choices_that_are_not_kept_are_never_taken():
    first_stays = run(Table(), steps=20, count=40, keeps=lambda choices: choices[:, 0] == START[0])
    assert int(first_stays.ids[0]) == int(START[0])
    none = run(Table(), keeps=lambda choices: torch.zeros(len(choices), dtype=torch.bool))
    assert torch.equal(none.ids, START)
    assert none.evaluated == 1


def test_a_choice_without_a_finite_value_is_never_taken_and_such_a_start_is_an_error():
    class Broken(Table):
        def exact(self, choices):
            return torch.where((choices != START).any(1), torch.nan, super().exact(choices))

    assert torch.equal(run(Broken()).ids, START)

    class Worse(Table):
        def exact(self, choices):
            return super().exact(choices) * torch.nan

    with pytest.raises(NumericalError, match="first row is not finite"):
        run(Worse())


def test_no_steps_return_the_start():
    assert torch.equal(run(Table(), steps=0).ids, START)
