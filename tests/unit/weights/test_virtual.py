# SPDX-License-Identifier: Apache-2.0
"""A virtual model is the model whose weights it makes, and gradients reach what is trained and nothing else."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from keelwright.core.errors import ConfigError, NumericalError
from keelwright.repair.linear import Linear, LinearConfig
from keelwright.weights.live import LiveSource, LiveTrial
from keelwright.weights.virtual import VirtualModel, scaled

IDS = torch.tensor([[3, 5, 7, 9], [4, 6, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def trio(request, make_llama):
    """Return a live model and frozen sources of an aligned and a tuned one."""

    def make(seed):
        return make_llama(seed, tied=request.param)

    return make(7), LiveSource(make(0)).frozen(), LiveSource(make(1)).frozen()


def load_into(module, source):
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(source.read(name, 0, parameter.numel()).view(parameter.shape))


def logits(module):
    with torch.no_grad():
        return module(input_ids=IDS, attention_mask=MASK).logits


@pytest.mark.parametrize("coefficient", [0.0, 0.3, 1.0])
def test_logits_equal_those_of_the_live_trial(trio, coefficient):
    module, aligned, tuned = trio
    virtual = VirtualModel(module, aligned, [tuned])
    found = virtual.logits(virtual.weights(scaled(torch.tensor([coefficient]))), IDS, MASK)
    load_into(module, tuned)
    with LiveTrial(module, {"aligned": aligned, "tuned": tuned}) as live:
        live.apply(Linear(LinearConfig(coefficient)))
        assert torch.allclose(found, logits(module), atol=2e-5)


def test_the_module_and_its_gradients_stay_as_they_are(trio):
    module, aligned, tuned = trio
    before = {name: one.detach().clone() for name, one in module.named_parameters()}
    coefficient = torch.tensor([0.5], requires_grad=True)
    virtual = VirtualModel(module, aligned, [tuned])
    virtual.logits(virtual.weights(scaled(coefficient)), IDS, MASK).square().sum().backward()
    assert coefficient.grad is not None and float(coefficient.grad) != 0.0
    for name, one in module.named_parameters():
        assert torch.equal(one, before[name]) and one.grad is None


def double(seed):
    """Return a model that stays in float64 throughout: Llama's norms do not."""
    torch.manual_seed(seed)
    return (
        GPT2LMHeadModel(
            GPT2Config(vocab_size=40, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1)
        )
        .double()
        .eval()
    )


def test_the_gradient_of_a_coefficient_is_that_of_finite_differences():
    module = double(7)
    sources = [LiveSource(double(seed)).frozen() for seed in (0, 1, 2)]
    virtual = VirtualModel(module, sources[0], sources[1:])
    layer = [name for name in virtual.vectors if ".h.1." in name]
    assert layer and len(layer) < len(virtual.vectors)

    def loss(values):
        return virtual.logits(virtual.weights(scaled(dict.fromkeys(layer, values))), IDS, MASK).square().mean()

    values = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(loss(values), values)
    step = 1e-5
    for index in range(2):
        shift = step * torch.eye(2, dtype=torch.float64)[index]
        expected = float(loss(values.detach() + shift) - loss(values.detach() - shift)) / (2 * step)
        assert float(found[index]) == pytest.approx(expected, rel=1e-6)


def test_only_what_changed_is_held(trio):
    module, aligned, _ = trio
    load_into(module, aligned)
    moved = LiveSource(module).frozen()
    name = "model.layers.0.mlp.up_proj.weight"
    values = moved._values[name]
    moved._values[name] = values + 1.0
    virtual = VirtualModel(module, aligned, [moved])
    assert set(virtual.vectors) == {name} and not virtual._fixed
    assert set(VirtualModel(module, aligned, [moved], select=["model.norm.weight"]).vectors) == {"model.norm.weight"}


def test_installed_weights_generate_and_leave_without_a_trace(trio):
    module, aligned, tuned = trio
    before = {name: one.detach().clone() for name, one in module.named_parameters()}
    virtual = VirtualModel(module, aligned, [tuned])
    weights = virtual.weights(scaled(torch.tensor([0.6])))
    expected = virtual.logits(weights, IDS, MASK)
    with virtual.installed(weights) as live:
        assert torch.allclose(logits(live), expected, atol=1e-6)
    assert all(torch.equal(one, before[name]) for name, one in module.named_parameters())


def test_half_precision_modules_run_in_their_own_dtype(make_llama):
    module = make_llama(3, dtype=torch.bfloat16)
    sources = [LiveSource(make_llama(seed, dtype=torch.bfloat16)).frozen() for seed in (0, 1)]
    virtual = VirtualModel(module, sources[0], sources[1:])
    weights = virtual.weights(scaled(torch.tensor([0.5])))
    assert {one.dtype for one in weights.values()} == {torch.bfloat16}
    assert {one.base.dtype for one in virtual.vectors.values()} == {torch.float32}


def test_unknown_tensors_and_broken_weights_are_errors(trio):
    module, aligned, tuned = trio
    with pytest.raises(ConfigError, match="no tensor 'nothing' to select"):
        VirtualModel(module, aligned, [tuned], select=["nothing"])
    tuned._values["model.norm.weight"][0] = float("nan")
    with pytest.raises(NumericalError, match="not a number"):
        VirtualModel(module, aligned, [tuned])
