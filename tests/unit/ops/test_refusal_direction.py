# SPDX-License-Identifier: Apache-2.0
"""Known answers: the abliterate sheet (13c)."""

import math

import pytest
import torch

from keelwright.ops.refusal_direction import (
    Candidate,
    difference_of_means,
    divergence,
    refusal_score,
    rows_without_direction,
    select,
    unit,
    without_direction,
)

V = torch.tensor([0.6, 0.8], dtype=torch.float64)
W = torch.tensor([[3.0, 4.0], [1.0, 2.0]], dtype=torch.float64)


def random_case(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    v = unit(torch.randn(7, generator=generator))
    return torch.randn(7, 5, generator=generator).to(dtype), v


def test_known_answers_of_a_matrix_and_of_embedding_rows():
    torch.testing.assert_close(without_direction(W, V), torch.tensor([[1.44, 1.6], [-1.08, -1.2]]).double())
    torch.testing.assert_close(rows_without_direction(W, V), torch.tensor([[0.0, 0.0], [-0.32, 0.24]]).double())


def test_nothing_is_written_along_the_direction_any_more():
    matrix, v = random_case()
    assert (v.float() @ without_direction(matrix, v)).abs().max() < 1e-6
    assert (rows_without_direction(matrix.T, v) @ v.float()).abs().max() < 1e-6
    bias = matrix[:, 0]
    assert abs(float(v.float() @ without_direction(bias, v))) < 1e-6


def test_taking_a_direction_out_twice_is_taking_it_out_once():
    matrix, v = random_case()
    once = without_direction(matrix, v)
    torch.testing.assert_close(without_direction(once, v), once)


def test_the_change_is_of_rank_one_and_as_large_as_what_was_written():
    matrix, v = random_case(torch.float64)
    change = matrix - without_direction(matrix, v)
    assert torch.linalg.matrix_rank(change) == 1
    torch.testing.assert_close(change.norm(), (v @ matrix).norm())


def test_strength_zero_gives_the_same_tensor_and_the_change_is_linear_in_it():
    matrix, v = random_case(torch.float64)
    assert without_direction(matrix, v, strength=0.0) is matrix
    assert rows_without_direction(matrix.T, v, strength=0.0).data_ptr() == matrix.data_ptr()
    half = without_direction(matrix, v, strength=0.5)
    torch.testing.assert_close(half, (matrix + without_direction(matrix, v)) / 2)


def test_half_precision_is_rounded_once():
    matrix, v = random_case(torch.bfloat16)
    wide = without_direction(matrix.float(), v).to(torch.bfloat16)
    assert torch.equal(without_direction(matrix, v), wide)


def test_refusal_score_is_the_log_odds_of_all_openings_together():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    assert float(refusal_score(logits, torch.tensor([0, 1]))) == pytest.approx(math.log(4.0), abs=1e-6)
    assert float(refusal_score(torch.tensor([[0.8, 0.2]]).log(), torch.tensor([0]))) == pytest.approx(1.3863, abs=1e-4)


def test_divergence_is_zero_for_equal_predictions_and_follows_the_definition():
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    assert float(divergence(p.log(), p.log())) == pytest.approx(0.0, abs=1e-12)
    assert float(divergence(p.log(), q.log())) == pytest.approx(0.143841, abs=1e-6)


def test_difference_of_means_is_harmful_minus_harmless_in_float64():
    harmful = torch.tensor([[[[1.0, 2.0]]], [[[3.0, 2.0]]]])
    found = difference_of_means(harmful, torch.tensor([[[[1.0, 1.0]]]]))
    assert found.dtype is torch.float64
    assert found[0, 0].tolist() == [1.0, 1.0]


def test_a_direction_without_length_is_not_a_number():
    assert unit(torch.zeros(3)).isnan().all()


@pytest.mark.parametrize(
    "worse",
    [
        {"layer": 8},
        {"induced": -0.1},
        {"divergence": 0.11},
        {"ablated": math.nan},
        {"divergence": math.nan},
    ],
)
def test_each_rule_drops_a_direction_that_would_otherwise_be_taken(worse):
    best = {"position": -1, "layer": 7, "ablated": -5.0, "induced": 0.0, "divergence": 0.1}
    second = Candidate(-2, 3, -1.0, 1.0, 0.01)
    assert select([Candidate(**best), second], layers=10) == Candidate(**best)
    assert select([Candidate(**{**best, **worse}), second], layers=10) == second


def test_without_an_admissible_direction_none_is_returned():
    assert select([Candidate(-1, 9, -5.0, 1.0, 0.0)], layers=10) is None
