# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaForCausalLM

from keelwright.core.errors import ConfigError
from keelwright.training.logit_lens import Lens, mlp_outputs

NewModel = Callable[..., LlamaForCausalLM]


def _states(n: int = 23) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    return torch.randn(n, 16, generator=draw, requires_grad=True), torch.randint(50, (n,), generator=draw)


@pytest.mark.parametrize("piece", [1, 4, 23, 100])
@pytest.mark.parametrize("normed", [False, True])
def test_in_pieces_it_equals_the_whole(new_model: NewModel, piece: int, normed: bool) -> None:
    model = new_model()
    states, targets = _states()
    weights = [states, model.lm_head.weight] + ([] if normed else [model.model.norm.weight])
    logits = model.lm_head(states if normed else model.model.norm(states))
    whole = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    found = Lens(model).cross_entropy(states, targets, normed=normed, piece=piece)
    torch.testing.assert_close(found, whole, rtol=1e-6, atol=1e-6)
    for one, other in zip(torch.autograd.grad(found, weights), torch.autograd.grad(whole, weights), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_logits_of_a_piece_are_not_kept_for_the_backward_pass(new_model: NewModel) -> None:
    kept: list[int] = []
    states, targets = _states(40)

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    vocab = new_model().config.vocab_size
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        Lens(new_model()).cross_entropy(states, targets, piece=8)
    assert max(kept) < 8 * vocab


def test_no_targets_cost_nothing(new_model: NewModel) -> None:
    states, targets = _states()
    assert float(Lens(new_model()).cross_entropy(states[:0], targets[:0]).detach()) == 0.0


def test_mlp_outputs_are_those_of_the_layers_asked_for_and_the_hooks_go(new_model: NewModel) -> None:
    model = new_model()
    before = [len(layer.mlp._forward_hooks) for layer in model.model.layers]
    ids = torch.arange(10)[None]
    with mlp_outputs(model, [1]) as found:
        model(input_ids=ids)
    assert list(found) == [1]
    assert found[1].shape == (1, 10, 16)
    assert found[1].requires_grad
    assert [len(layer.mlp._forward_hooks) for layer in model.model.layers] == before


def test_hooks_go_when_the_model_fails(new_model: NewModel) -> None:
    model = new_model()
    with pytest.raises(IndexError), mlp_outputs(model, [0]):
        model(input_ids=torch.tensor([[10**6]]))
    assert not model.model.layers[0].mlp._forward_hooks


@pytest.mark.parametrize(
    "model",
    [
        GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0)),
        GPTNeoXForCausalLM(
            GPTNeoXConfig(
                num_hidden_layers=2, hidden_size=16, num_attention_heads=2, vocab_size=50, intermediate_size=32
            )
        ),
    ],
    ids=["gpt2", "gpt_neox"],
)
def test_the_last_state_through_the_head_is_the_models_own_output(model: torch.nn.Module) -> None:
    model.eval()
    with mlp_outputs(model, [0, 1]) as found:
        output = model(input_ids=torch.arange(10)[None], output_hidden_states=True)
    lens = Lens(model)
    torch.testing.assert_close(lens.head(output.hidden_states[-1]), output.logits)
    last = model.base_model
    unnormed: list[Tensor] = []
    norm = last.ln_f if hasattr(last, "ln_f") else last.final_layer_norm
    handle = norm.register_forward_pre_hook(lambda _module, inputs: unnormed.append(inputs[0]))
    model(input_ids=torch.arange(10)[None])
    handle.remove()
    torch.testing.assert_close(lens.head(lens.norm(unnormed[0])), output.logits)
    assert set(found) == {0, 1}


def test_a_model_without_a_known_norm_is_told(new_model: NewModel) -> None:
    model = new_model()
    del model.model.norm
    with pytest.raises(ConfigError, match="The parts of LlamaForCausalLM are not known"):
        Lens(model)
