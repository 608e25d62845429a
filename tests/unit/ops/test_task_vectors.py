# SPDX-License-Identifier: Apache-2.0
"""The shared steps of the task-vector family, by hand."""

from __future__ import annotations

import pytest
import torch

from keelwright.ops.task_vectors import (
    add_disjoint_and_mean,
    add_merged,
    ascending_ranks,
    breadcrumb_counts,
    l1_scale,
    magnitude_sum,
    prune_by_rank,
    support_counts,
    trim,
    weigh,
)


def row(*values):
    return torch.tensor(values, dtype=torch.float32)


def test_trimming_keeps_the_largest_after_those_dropped_and_the_lowest_index_of_equal_ones():
    values = row(2, -3, 3, 1, -2, 2)
    assert trim(values, 2).tolist() == [0, -3, 3, 0, 0, 0]
    assert trim(values, 3).tolist() == [2, -3, 3, 0, 0, 0]
    assert trim(values, 2, dropped=1).tolist() == [2, 0, 3, 0, 0, 0]
    assert trim(values.view(2, 3), 6).tolist() == values.view(2, 3).tolist()
    assert trim(values, 0).tolist() == [0] * 6
    assert values.tolist() == [2, -3, 3, 1, -2, 2], "the argument is left alone"


def test_merged_vectors_go_on_the_base_times_the_coefficient():
    base, vectors = row(1, 1), [row(2, -1), row(-1, -1)]
    assert add_merged(base, vectors, (1.0, 1.0), coefficient=0.5).tolist() == [1.5, 0.0]
    assert add_merged(base, vectors, (1.0, 1.0), coefficient=1.0, elect="mass").tolist() == [3, -1]
    assert add_merged(base, vectors, (1.0, 1.0), coefficient=1.0, elect="mass", normalize=True).tolist() == [3, 0]


def test_a_tied_election_takes_the_sign_that_it_is_told():
    base, vectors = row(0), [row(2), row(-2)]
    for is_plus, expected in ((True, 2.0), (False, -2.0)):
        merged = add_merged(base, vectors, (1.0, 1.0), coefficient=1.0, elect="mass", zero_is_plus=is_plus)
        assert merged.item() == expected


def test_an_election_that_is_no_tie_does_not_depend_on_the_sign_of_ties():
    random = torch.Generator().manual_seed(1)
    base, *vectors = (torch.randn(50, generator=random) for _ in range(4))
    options = {"coefficient": 0.7, "elect": "count", "normalize": True}
    plus = add_merged(base, vectors, (1.0, 2.0, 0.5), zero_is_plus=True, **options)
    assert torch.equal(add_merged(base, vectors, (1.0, 2.0, 0.5), zero_is_plus=False, **options), plus)


def test_the_sum_of_magnitudes_is_restored_unless_there_is_nothing_to_scale():
    assert magnitude_sum(row(1, -2, 3, -4)) == 10.0 and magnitude_sum(torch.zeros(0)) == 0.0
    assert l1_scale(10.0, 3.0) == pytest.approx(10 / 3)
    assert l1_scale(10.0, 0.0) == l1_scale(1e-8, 1e-9) == 1.0


def test_weighing_rescales_as_asked():
    delta, kept = row(1, -2, 3, -4), row(1, -2, 0, 0)
    for rescale, expected in (("none", [2, -4]), ("inverse_keep", [4, -8]), ("l1", [20 / 3, -40 / 3])):
        (vector,) = weigh([delta], [kept], [2.0], [0.5], rescale)
        assert vector[:2].tolist() == pytest.approx(expected) and vector[2:].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("density", "gamma", "expected"),
    [(0.6, 0.1, (1, 6)), (0.9, 0.3, (1, 9)), (0.29, 0.0, (0, 2)), (1.0, 0.5, (0, 10)), (0.01, 1.0, (9, 1))],
)
def test_counts_of_breadcrumbs_meet_the_density_first(density, gamma, expected):
    assert breadcrumb_counts(10, density=density, gamma=gamma) == expected


def test_ranks_grow_with_the_magnitude_and_the_first_of_equal_ones_is_the_smaller():
    assert ascending_ranks(row(4, -1, 3, 1).view(1, 4)).tolist() == [[3, 0, 2, 1]]


def test_pruning_by_rank_does_not_depend_on_where_the_rows_are_cut():
    random = torch.Generator().manual_seed(2)
    values, key = torch.randn(6, 9, generator=random), (1, 2)
    options = {"density": 0.5, "epsilon": 0.2, "key": key, "divide": True}
    whole = prune_by_rank(values, offset=0, **options)
    parts = [prune_by_rank(values[i : i + 2], offset=9 * i, **options) for i in range(0, 6, 2)]
    assert torch.equal(torch.cat(parts), whole) and 0 < whole.count_nonzero() < 54


def test_supports_count_who_changes_an_entry():
    supports, counts = support_counts([row(1, 0.1, 0), row(-1, 1, 0)], epsilon=0.1)
    assert [support.tolist() for support in supports] == [[True, False, False], [True, True, False]]
    assert counts.tolist() == [2, 1, 0]
    merged = add_disjoint_and_mean(row(1, 1, 1), [row(1, 0.1, 0), row(-1, 1, 0)], epsilon=0.1, factors=(5.0, 3.0))
    assert merged.tolist() == [1, 4, 1]
