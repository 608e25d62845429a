# SPDX-License-Identifier: Apache-2.0
"""RESTA, by hand."""

import pytest
import torch

from keelwright.core.catalogue import find_method
from keelwright.core.errors import ConfigError
from keelwright.core.protocols import Chunk, Reach, TensorEntry
from keelwright.models.adapters import LoraFactors
from keelwright.repair.resta import Resta, RestaConfig, add_factors, resta

ALIGNED = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
UNALIGNED = torch.tensor([[0.0, 2.0], [5.0, 4.5]])
TUNED = torch.tensor([[1.5, 2.0], [3.0, 3.0]])


def test_known_answer_of_a_two_by_two_matrix():
    found = resta(ALIGNED, UNALIGNED, TUNED, coefficient=0.5)
    assert found.tolist() == [[2.0, 2.0], [2.0, 2.75]]


def test_no_strength_returns_the_tuned_tensor_itself():
    assert resta(ALIGNED, UNALIGNED, TUNED, coefficient=0.0) is TUNED


def test_the_sign_points_from_unaligned_to_aligned():
    assert torch.equal(resta(ALIGNED, UNALIGNED, UNALIGNED, coefficient=1.0), ALIGNED)
    assert torch.equal(resta(ALIGNED, UNALIGNED, ALIGNED, coefficient=-1.0), UNALIGNED)


def test_a_small_vector_between_close_numbers_survives_sixteen_bits():
    aligned = torch.tensor([1.0078125], dtype=torch.bfloat16)
    unaligned = torch.tensor([1.0], dtype=torch.bfloat16)
    tuned = torch.tensor([0.0], dtype=torch.bfloat16)
    assert resta(aligned, unaligned, tuned, coefficient=0.3).item() == pytest.approx(0.3 * 0.0078125, rel=2**-8)


def test_arguments_are_left_alone_in_every_dtype():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        given = [one.to(dtype) for one in (ALIGNED, UNALIGNED, TUNED)]
        kept = [one.clone() for one in given]
        resta(*given, coefficient=0.7)
        assert all(torch.equal(one, two) for one, two in zip(given, kept, strict=True))


def test_the_output_has_the_dtype_of_the_tuned_tensor():
    assert resta(ALIGNED, UNALIGNED.double(), TUNED.to(torch.bfloat16), coefficient=1.0).dtype is torch.bfloat16


@pytest.mark.parametrize("coefficient", [-0.1, float("nan"), float("inf")])
def test_negative_and_endless_strengths_are_errors(coefficient):
    with pytest.raises(ConfigError, match="'coefficient' is out of range") as caught:
        RestaConfig(coefficient)
    assert caught.value.expected == "a number in [0, inf)"


def test_the_edit_names_its_roles_with_the_layout_last():
    assert Resta().roles() == ("aligned", "unaligned", "tuned")
    assert Resta().config.coefficient == 0.5


def test_no_strength_copies_the_tuned_model():
    edit = Resta(RestaConfig(0.0))
    assert edit.reach("w") is Reach.COPY and edit.copies("w") == "tuned"


def test_with_strength_every_chunk_stands_alone():
    edit = Resta(RestaConfig(0.5))
    roles = {"aligned": ALIGNED, "unaligned": UNALIGNED, "tuned": TUNED}
    chunk = Chunk({role: one.flatten() for role, one in roles.items()}, 0, TensorEntry("w", "F32", (2, 2)))
    assert edit.reach("w") is Reach.POINTWISE and edit.reduce("w", chunk, {}) == {}
    assert edit.edit("w", chunk, {}).tolist() == [2.0, 2.0, 2.0, 2.75]


def test_the_combination_sums_to_one():
    assert Resta(RestaConfig(0.5)).combination() == {"aligned": 0.5, "unaligned": -0.5, "tuned": 1.0}


def test_the_catalogue_loads_it_and_says_that_it_is_a_reconstruction():
    line = find_method("resta", room="repair")
    assert line.load() is Resta and line.status == "reconstruction"
    assert all(Resta.config_class(one).coefficient == one for one in Resta.search_space.grid)
    assert Resta.search_space.neutral == 0.0


def random_factors(seed, right=None):
    random = torch.Generator().manual_seed(seed)
    left, own = torch.randn(3, 2, generator=random), torch.randn(2, 4, generator=random)
    return LoraFactors(left, own if right is None else right, 0.5)


def test_adding_factors_is_another_method():
    task, safety = random_factors(0), random_factors(1)
    both = add_factors(task, safety, coefficient=0.5).delta()
    cross = 0.25 * (task.left @ safety.right + safety.left @ task.right)
    assert torch.allclose(both, task.delta() + 0.25 * safety.delta() + cross, atol=1e-6)
    base = torch.zeros(3, 4)
    in_weights = resta(base, base - safety.delta(), base + task.delta(), coefficient=0.5)
    assert not torch.allclose(both, in_weights, atol=0.1)


def test_adding_factors_that_share_a_overshoots_by_one_plus_gamma():
    task = random_factors(0)
    safety = random_factors(1, right=task.right)
    base = torch.zeros(3, 4)
    in_weights = resta(base, base - safety.delta(), base + task.delta(), coefficient=0.5)
    assert torch.allclose(add_factors(task, safety, coefficient=0.5).delta(), 1.5 * in_weights, atol=1e-6)


def test_factors_of_other_ranks_are_refused():
    one = random_factors(0)
    with pytest.raises(ConfigError, match="same rank, shape and scale") as caught:
        add_factors(one, LoraFactors(one.left[:, :1], one.right[:1], 0.5), coefficient=1.0)
    assert caught.value.found == "factors (3, 1) and (1, 4) with scale 0.5"


def test_it_is_task_arithmetic_from_the_unaligned_model():
    both = UNALIGNED + 1.0 * (TUNED - UNALIGNED) + 0.7 * (ALIGNED - UNALIGNED)
    assert torch.allclose(resta(ALIGNED, UNALIGNED, TUNED, coefficient=0.7), both, atol=1e-6)
