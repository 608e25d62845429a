# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from keelwright.training.lora import attach_lora
from keelwright.training.per_sample import (
    CountSketch,
    cosine,
    padded,
    per_sample_cosines,
    per_sample_gradients,
    row_loss,
    trained_tensors,
)
from keelwright.training.rows import encode_rows


def one_by_one(module, encoded, weights):
    """Return each row's gradient by plain autograd, without padding."""
    parameters = dict(module.named_parameters())
    found = []
    for row in encoded:
        logits = module(input_ids=row.ids[None], use_cache=False).logits[0, row.prompt_tokens - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, row.ids[row.prompt_tokens :])
        gradients = torch.autograd.grad(loss, [parameters[name] for name in weights], allow_unused=True)
        found.append(
            {
                name: torch.zeros_like(weights[name]) if one is None else one
                for name, one in zip(weights, gradients, strict=True)
            }
        )
    return found


@pytest.fixture
def case(new_model, tokenizer, rows):
    module = new_model()
    mixed = [*rows[:3], *(type(rows[0])(row.prompt, "take the brush.") for row in rows[3:5])]
    encoded = encode_rows(tokenizer, mixed, module=module)
    return module, encoded, trained_tensors(module)


@pytest.mark.parametrize("chunk", [1, 2, 16])
def test_gradients_of_a_batch_are_those_of_its_rows_one_by_one(case, chunk):
    module, encoded, weights = case
    found = per_sample_gradients(row_loss(module), weights, *padded(encoded, pad_id=0), chunk=chunk)
    for index, expected in enumerate(one_by_one(module, encoded, weights)):
        for name, one in expected.items():
            torch.testing.assert_close(found[name][index], one, atol=1e-5, rtol=1e-4)


def test_gradients_of_an_adapter_alone(new_model, tokenizer, rows):
    module = new_model()
    adapter = attach_lora(module, rank=2, alpha=4.0, seed=0)
    encoded, weights = encode_rows(tokenizer, rows[:3], module=module), trained_tensors(module)
    assert weights
    assert all("lora_" in name for name in weights)
    found = per_sample_gradients(row_loss(module), weights, *padded(encoded, pad_id=0))
    expected = one_by_one(module, encoded, weights)
    for index, one in enumerate(expected):
        assert max(float((found[name][index] - one[name]).abs().max()) for name in weights) < 1e-5
    adapter.detach()


def test_cosines_are_those_of_the_gradients(case):
    module, encoded, weights = case
    inputs = padded(encoded, pad_id=0)
    gradients = per_sample_gradients(row_loss(module), weights, *inputs)
    singles = [{name: one[index] for name, one in gradients.items()} for index in range(len(encoded))]
    cosines, norms = per_sample_cosines(row_loss(module), weights, singles[0], *inputs, chunk=2)
    assert float(cosines[0]) == pytest.approx(1.0, abs=1e-5)
    for index, single in enumerate(singles):
        flat = [torch.cat([part.flatten() for part in one.values()]).double() for one in (single, singles[0])]
        assert float(cosines[index]) == pytest.approx(float(torch.cosine_similarity(*flat, dim=0)), abs=1e-5)
        assert float(cosine(single, singles[0])) == pytest.approx(float(cosines[index]), abs=1e-5)
        assert float(norms[index]) == pytest.approx(float(flat[0].norm()), rel=1e-5)


def test_a_gradient_without_length_has_cosine_zero():
    assert float(cosine({"w": torch.zeros(2)}, {"w": torch.ones(2)})) == 0.0


def test_weights_are_not_changed_and_need_no_gradient(case):
    module, encoded, weights = case
    before = {name: one.clone() for name, one in weights.items()}
    per_sample_gradients(row_loss(module), weights, *padded(encoded, pad_id=0))
    assert all(torch.equal(before[name], one) for name, one in module.named_parameters())
    assert all(one.grad is None for one in module.parameters())


def test_padding_and_prompts_carry_no_loss(case):
    _, encoded, _ = case
    ids, labels = padded(encoded, pad_id=0)
    for index, row in enumerate(encoded):
        kept = labels[index] != -100
        assert int(kept.sum()) == row.answer_tokens
        assert ids[index][kept].tolist() == row.ids[row.prompt_tokens :].tolist()


def test_sketches_keep_dot_products_on_average_and_are_linear():
    generator = torch.Generator().manual_seed(0)
    left, right = ({"a": torch.randn(1, 30, 20, generator=generator)} for _ in range(2))
    wanted = float((left["a"] * right["a"]).sum())
    found = []
    for seed in range(200):
        sketch = CountSketch({"a": (30, 20)}, size=256, generator=torch.Generator().manual_seed(seed))
        found.append(float((sketch(left) * sketch(right)).sum()))
        doubled = sketch({"a": 2 * left["a"] + right["a"]})
        torch.testing.assert_close(doubled, 2 * sketch(left) + sketch(right), atol=1e-4, rtol=1e-4)
    spread = math.sqrt(2 / 256) * float(left["a"].norm() * right["a"].norm())
    assert abs(sum(found) / 200 - wanted) < 4 * spread / math.sqrt(200)
    assert torch.tensor(found).std() < 1.2 * spread


def test_a_sketch_of_one_hot_entries_moves_each_to_one_place_with_a_sign():
    sketch = CountSketch({"a": (6,), "b": (2, 2)}, size=64, generator=torch.Generator().manual_seed(1))
    found = sketch({"a": torch.eye(10)[:, :6], "b": torch.eye(10)[:, 6:].reshape(10, 2, 2)})
    assert (found.abs().sum(1) == 1).all()
