# SPDX-License-Identifier: Apache-2.0
"""LoRA on a live model: trained, read as factors, taken off."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from keelwright.core.protocols import Silent
from keelwright.data.rows import ChatRow
from keelwright.training.loop import TrainConfig, train

Model = Callable[..., LlamaForCausalLM]
CONFIG = TrainConfig(steps=6, batch_size=4, lr=1e-2, lora_rank=4, checkpoint_every=2)
IDS = torch.arange(3, 19)[None]


def _logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_the_model_is_given_back_unchanged(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, rows: list[ChatRow]
) -> None:
    model = new_model()
    before, logits = {name: one.clone() for name, one in model.state_dict().items()}, _logits(model)
    adapter = train(model, tokenizer, rows, CONFIG).adapter
    assert adapter is not None
    assert not torch.equal(_logits(model), logits)
    assert adapter.detach() is model
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(_logits(model), logits)
    assert all(one.requires_grad for one in model.parameters())
    assert not hasattr(model, "peft_config")


def test_factors_added_to_the_weights_give_the_trained_model(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, rows: list[ChatRow]
) -> None:
    model = new_model()
    adapter = train(model, tokenizer, rows, CONFIG).adapter
    assert adapter is not None
    trained, factors = _logits(model), adapter.factors()
    adapter.detach()
    names = {f"{name}.weight" for name, one in model.named_modules() if isinstance(one, torch.nn.Linear)}
    assert set(factors) == names - {"lm_head.weight"}
    with torch.no_grad():
        for name, change in factors.items():
            assert change.right.shape[0] == change.left.shape[1] == 4
            model.get_parameter(name).add_(change.delta())
    torch.testing.assert_close(_logits(model), trained, rtol=1e-4, atol=1e-4)


def test_a_saved_adapter_opens_with_peft(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, rows: list[ChatRow], tmp_path: Path
) -> None:
    model = new_model()
    model.save_pretrained(tmp_path / "base")
    adapter = train(model, tokenizer, rows, CONFIG).adapter
    assert adapter is not None
    adapter.save(tmp_path / "adapter")
    opened = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(_logits(opened), _logits(model))


def test_an_interrupted_adapter_leaves_the_model_and_resumes_to_the_same_bits(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, rows: list[ChatRow], tmp_path: Path
) -> None:
    class Stop(Silent):
        left = 5

        def advance(self, count: int = 1) -> None:
            self.left -= count
            if self.left <= 0:
                raise KeyboardInterrupt

    whole = train(new_model(), tokenizer, rows, CONFIG).adapter
    model = new_model()
    with pytest.raises(KeyboardInterrupt):
        train(model, tokenizer, rows, CONFIG, folder=tmp_path, progress=Stop())
    assert not [name for name in model.state_dict() if "lora" in name]
    resumed = train(model, tokenizer, rows, CONFIG, folder=tmp_path).adapter
    assert whole is not None
    assert resumed is not None
    expected, found = whole.factors(), resumed.factors()
    assert all(torch.equal(expected[name].left, found[name].left) for name in expected)
    assert all(torch.equal(expected[name].right, found[name].right) for name in expected)


def test_the_global_random_state_is_left_as_it_was(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, rows: list[ChatRow]
) -> None:
    model = new_model()
    state = torch.random.get_rng_state()
    train(model, tokenizer, rows, CONFIG)
    assert torch.equal(torch.random.get_rng_state(), state)
