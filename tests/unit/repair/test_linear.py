# SPDX-License-Identifier: Apache-2.0
"""Linear interpolation, by hand."""

import pytest
import torch

from keelwright.core.catalogue import find_method
from keelwright.core.errors import ConfigError
from keelwright.core.protocols import Chunk, Reach, TensorEntry
from keelwright.repair.linear import Linear, LinearConfig, linear
from keelwright.weights.stream import evaluate

ALIGNED = torch.tensor([0.0, 1.0, -2.0, 4.0])
TUNED = torch.tensor([1.0, 1.0, 2.0, 8.0])


def test_known_answer_of_four_elements():
    assert linear(ALIGNED, TUNED, coefficient=0.25).tolist() == [0.25, 1.0, -1.0, 5.0]


def test_coefficient_zero_returns_the_aligned_tensor_and_one_the_tuned():
    assert linear(ALIGNED, TUNED, coefficient=0.0) is ALIGNED
    assert linear(ALIGNED, TUNED, coefficient=1.0) is TUNED


def test_arguments_are_left_alone():
    aligned, tuned = ALIGNED.clone(), TUNED.clone()
    linear(aligned, tuned, coefficient=0.3)
    assert torch.equal(aligned, ALIGNED) and torch.equal(tuned, TUNED)


def test_entries_that_both_share_stay_to_the_bit():
    shared = torch.tensor([0.1, 1 / 3, -1e-30])
    assert torch.equal(linear(shared, shared.clone(), coefficient=0.3), shared)


def test_the_sum_is_evaluated_in_float32_and_rounded_once():
    aligned, tuned = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.0078125], dtype=torch.bfloat16)
    # In bfloat16 throughout, 0.3 alone would already be rounded.
    expected = torch.tensor([0.7 * 1.0 + 0.3 * 1.0078125]).to(torch.bfloat16)
    assert torch.equal(linear(aligned, tuned, coefficient=0.3), expected)


def test_the_output_has_the_dtype_of_the_tuned_tensor():
    assert linear(ALIGNED, TUNED.half(), coefficient=0.5).dtype is torch.float16
    assert linear(ALIGNED.double(), TUNED.double(), coefficient=0.5).dtype is torch.float64


@pytest.mark.parametrize("coefficient", [-0.01, 1.01, float("nan"), float("inf")])
def test_coefficients_outside_zero_to_one_are_errors(coefficient):
    with pytest.raises(ConfigError, match="'coefficient' is out of range") as caught:
        LinearConfig(coefficient)
    assert caught.value.expected == "a number in [0, 1]"


def test_the_edit_names_its_roles_with_the_layout_last():
    assert Linear().roles() == ("aligned", "tuned")
    assert Linear().config.coefficient == 0.6


@pytest.mark.parametrize(("coefficient", "role"), [(0.0, "aligned"), (1.0, "tuned")])
def test_the_ends_copy(coefficient, role):
    edit = Linear(LinearConfig(coefficient))
    assert edit.reach("w") is Reach.COPY and edit.copies("w") == role


def test_between_the_ends_every_chunk_stands_alone():
    edit = Linear(LinearConfig(0.25))
    chunk = Chunk({"aligned": ALIGNED, "tuned": TUNED}, 0, TensorEntry("w", "F32", (4,)))
    assert edit.reach("w") is Reach.POINTWISE and edit.reduce("w", chunk, {}) == {}
    assert edit.edit("w", chunk, {}).tolist() == [0.25, 1.0, -1.0, 5.0]


def test_the_combination_sums_to_one():
    assert Linear(LinearConfig(0.25)).combination() == {"aligned": 0.75, "tuned": 0.25}


def test_the_catalogue_loads_it_and_its_search_starts_inside_the_range():
    assert find_method("linear", room="repair").load() is Linear
    assert Linear.search_space.neutral == 1.0
    assert [Linear.config_class(one).coefficient for one in Linear.search_space.grid] == [0.2, 0.4, 0.6, 0.8]


SEVERAL = {
    "aligned": torch.tensor([1.0, 0.0, 0.0]),
    "tuned": torch.tensor([0.0, 1.0, 0.0]),
    "tuned_2": torch.tensor([0.0, 0.0, 1.0]),
}


def run(edit: Linear, **models: torch.Tensor) -> torch.Tensor:
    """Return the tensor that the engine makes, in chunks of two."""

    class Memory:
        def __init__(self, tensor):
            self.tensor = tensor

        def read(self, name, start, stop):
            return self.tensor.reshape(-1)[start:stop].clone()

        def describe(self):
            return "memory"

    sources = {role: Memory(models[role]) for role in edit.roles()}
    return torch.cat([values for _, values in evaluate(edit, sources, TensorEntry("w", "F32", (3,)), chunk_elements=2)])


def test_the_known_answer_of_two_models_comes_out_of_the_engine():
    aligned, tuned = torch.tensor([0.0, 2.0, 1.0]), torch.tensor([1.0, 4.0, 1.0])
    assert run(Linear(LinearConfig(0.5)), aligned=aligned, tuned=tuned).tolist() == [0.5, 3.0, 1.0]


@pytest.mark.parametrize(
    ("weights", "normalize", "wanted"),
    [
        ((1.0, 2.0, 5.0), True, [0.125, 0.25, 0.625]),
        ((1.0, 2.0, 5.0), False, [1.0, 2.0, 5.0]),
        (2.0, True, [1 / 3, 1 / 3, 1 / 3]),
        ((2.0, -1.0, 1.0), True, [1.0, -0.5, 0.5]),
    ],
)
def test_several_models_are_weighted_in_the_order_given_the_aligned_one_first(weights, normalize, wanted):
    edit = Linear(LinearConfig(weight=weights, normalize=normalize), models=2)
    assert edit.roles() == ("aligned", "tuned_2", "tuned")
    assert run(edit, **SEVERAL).tolist() == pytest.approx(wanted, abs=1e-7)
    assert list(edit.combination().values()) == pytest.approx(wanted, abs=1e-12)


def test_without_the_aligned_model_the_tuned_ones_are_averaged():
    edit = Linear(LinearConfig(weight=(1.0, 3.0)), models=2, based=False)
    assert edit.roles() == ("tuned_2", "tuned")
    assert run(edit, **SEVERAL).tolist() == [0.0, 0.25, 0.75]


@pytest.mark.parametrize(
    ("weights", "role"), [((0.0, 3.0, 0.0), "tuned"), ((0.0, 0.0, 1.0), "tuned_2"), ((2.0, 0.0, 0.0), "aligned")]
)
def test_a_model_with_all_the_weight_is_copied(weights, role):
    edit = Linear(LinearConfig(weight=weights), models=2)
    assert edit.reach("w") is Reach.COPY and edit.copies("w") == role


def test_a_single_model_with_half_a_weight_is_halved_where_nothing_is_normalised():
    edit = Linear(LinearConfig(weight=(0.5,), normalize=False), based=False)
    assert edit.reach("w") is Reach.POINTWISE
    assert run(edit, **SEVERAL).tolist() == [0.0, 0.5, 0.0]


def test_weights_on_which_all_agree_stay_to_the_bit():
    model = torch.tensor([0.1, 1 / 3, -1e-30])
    edit = Linear(LinearConfig(weight=(0.3, 0.5, 0.9)), models=2)
    assert torch.equal(run(edit, aligned=model, tuned=model, tuned_2=model), model)


def test_several_models_without_weights_are_an_error():
    with pytest.raises(ConfigError, match="needs a weight for each model") as caught:
        Linear(models=2)
    assert caught.value.fix == "set 'weight': one per model, or one number for all"


def test_weights_that_sum_to_zero_or_are_too_few_are_errors():
    with pytest.raises(ConfigError, match="sum to zero"):
        Linear(LinearConfig(weight=(1.0, -1.0)))
    with pytest.raises(ConfigError, match="'weight' does not fit the number of models"):
        Linear(LinearConfig(weight=(1.0, 1.0)), models=2)
    with pytest.raises(ConfigError, match="'weight' is out of range"):
        LinearConfig(weight=(1.0, float("nan")))
    with pytest.raises(ConfigError, match="'weight' is empty"):
        LinearConfig(weight=())
