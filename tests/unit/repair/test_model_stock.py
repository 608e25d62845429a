# SPDX-License-Identifier: Apache-2.0
"""Model Stock: the tests of its sheets."""

from __future__ import annotations

import math

import pytest
import torch

from keelwright.core.errors import ConfigError
from keelwright.core.protocols import TensorEntry
from keelwright.models.dtypes import STORED_NAMES
from keelwright.ops.gram import gram
from keelwright.repair.model_stock import ModelStock, ModelStockConfig, model_stock, stock_ratio
from keelwright.weights.stream import evaluate, reduce_tensor


class Memory:
    """One tensor as a source."""

    def __init__(self, tensor):
        self.tensor = tensor

    def read(self, name, start, stop):
        return self.tensor.reshape(-1)[start:stop].clone()

    def describe(self):
        return "memory"


def run(edit, chunk_elements=2, **models):
    """Return the tensor that the engine makes."""
    layout = models[edit.roles()[-1]]
    entry = TensorEntry("w", STORED_NAMES[layout.dtype], tuple(layout.shape))
    sources = {role: Memory(tensor) for role, tensor in models.items()}
    parts = evaluate(edit, sources, entry, chunk_elements=chunk_elements)
    return torch.cat([values for _, values in parts]).view(layout.shape)


def close(found, wanted):
    return torch.allclose(found.double(), torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-6)


def facts(edit, **models):
    """Return what the edit reports of the tensor."""
    layout = models[edit.roles()[-1]]
    entry = TensorEntry("w", STORED_NAMES[layout.dtype], tuple(layout.shape))
    return edit.facts(reduce_tensor(edit, {role: Memory(tensor) for role, tensor in models.items()}, entry))


ONE, TWO = torch.tensor([2.0, 0.0]), torch.tensor([1.0, math.sqrt(3)])
BASE = torch.zeros(2)


def test_known_answer_of_the_sheet():
    # A cosine of 0.5 between two task vectors: a ratio of 2/3.
    assert close(model_stock(BASE, (ONE, TWO)), (1.0, 0.5773503))
    assert close(run(ModelStock(), 1, aligned=BASE, tuned=ONE, tuned_2=TWO), (1.0, 0.5773503))
    assert facts(ModelStock(), aligned=BASE, tuned=ONE, tuned_2=TWO)["ratio"] == pytest.approx(2 / 3, abs=1e-6)


@pytest.mark.parametrize("filter_wise", [False, True])
def test_equal_fine_tunes_come_out_to_the_bit(filter_wise):
    random = torch.Generator().manual_seed(0)
    base, model = torch.randn(4, 5, generator=random), torch.randn(4, 5, generator=random)
    edit = ModelStock(ModelStockConfig(filter_wise), models=3)
    assert torch.equal(run(edit, aligned=base, tuned=model, tuned_2=model, tuned_3=model), model)


def test_fine_tunes_at_a_right_angle_give_the_base():
    base = torch.tensor([0.1, 1 / 3])
    given = {"aligned": base, "tuned": base + torch.tensor([1.0, 0.0]), "tuned_2": base + torch.tensor([0.0, 2.0])}
    assert close(run(ModelStock(), **given), base.tolist())


def test_more_models_use_the_mean_cosine_over_pairs():
    # Cosines 0.5, 0 and sqrt(3)/2 between (2, 0), (1, sqrt 3), (0, 1).
    third = torch.tensor([0.0, 1.0])
    cosine = (0.5 + 0.0 + math.sqrt(3) / 2) / 3
    ratio = 3 * cosine / (1 + 2 * cosine)
    assert float(stock_ratio(gram((ONE, TWO, third)))) == pytest.approx(ratio, abs=1e-7)
    wanted = [ratio * float(one) for one in (ONE + TWO + third) / 3]
    assert close(run(ModelStock(models=3), aligned=BASE, tuned=ONE, tuned_2=TWO, tuned_3=third), wanted)


def test_small_task_vectors_have_the_angle_of_large_ones():
    scale = 1e-5
    assert close(model_stock(BASE, (scale * ONE, scale * TWO)) / scale, (1.0, 0.5773503))


def test_task_vectors_of_zero_give_the_base_to_the_bit():
    base = torch.tensor([0.1, 1 / 3])
    for tuned_2 in (base, base + 1.0):
        assert torch.equal(run(ModelStock(), aligned=base, tuned=base, tuned_2=tuned_2), base)


def test_opposed_task_vectors_give_the_base_when_clipped_and_step_away_otherwise():
    other = torch.tensor([-1.0, math.sqrt(3)])  # cosine -0.5 with (2, 0)
    assert close(model_stock(BASE, (ONE, other)), (0.0, 0.0))
    assert close(model_stock(BASE, (ONE, other), clip=False), (-1.0, -math.sqrt(3)))
    assert close(model_stock(BASE, (ONE, -ONE), clip=False), (0.0, 0.0))


@pytest.mark.parametrize("shape", [(6,), (4, 5), (3, 2, 4), (5, 1)])
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_by_rows_each_row_is_a_tensor_of_its_own(shape, chunk):
    random = torch.Generator().manual_seed(len(shape))
    base, *models = (torch.randn(shape, generator=random) for _ in range(4))
    edit = ModelStock(ModelStockConfig(filter_wise=True), models=3)
    found = run(edit, chunk, aligned=base, tuned=models[0], tuned_2=models[1], tuned_3=models[2])
    rows = range(shape[0]) if len(shape) > 1 else [slice(None)]
    for row in rows:
        assert torch.allclose(found[row], model_stock(base[row], [one[row] for one in models]), rtol=1e-5, atol=1e-5)
    assert torch.allclose(found, model_stock(base, models, filter_wise=True), rtol=1e-6, atol=1e-6)


def test_a_single_fine_tune_is_refused():
    with pytest.raises(ConfigError, match="'model_stock' does not take 1 tuned model") as caught:
        ModelStock(models=1)
    assert caught.value.expected.startswith("at least 2")


def test_rows_that_lie_across_two_blocks_of_a_large_tensor_have_one_ratio():
    # 350,005 elements are two blocks of the reduction, and 2**18 is no multiple of 5.
    random = torch.Generator().manual_seed(5)
    base, one, two = (torch.randn(70_001, 5, generator=random) for _ in range(3))
    found = run(ModelStock(ModelStockConfig(filter_wise=True)), 1 << 18, aligned=base, tuned=one, tuned_2=two)
    assert torch.allclose(found, model_stock(base, (one, two), filter_wise=True), rtol=1e-6, atol=1e-6)
