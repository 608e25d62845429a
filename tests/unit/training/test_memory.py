# SPDX-License-Identifier: Apache-2.0
"""The memory estimate: against what torch allocates, and rules that it must follow."""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from keelwright.core.errors import DataError
from keelwright.data.rows import ChatRow
from keelwright.harden.booster import BoosterConfig, BoosterObjective
from keelwright.training.config import TrainConfig
from keelwright.training.loop import train
from keelwright.training.memory import Copies, Shape, estimate_training, shape_of, trained_entries
from keelwright.training.recipe import Feed, Recipe
from keelwright.training.rows import encode_rows

ORGANISM = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4}
SIXTY_MILLION = {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 10, "num_attention_heads": 10}
BOOSTER = Copies(gradients=2, weights=1)


def _config(tokenizer: PreTrainedTokenizerFast, sizes: dict[str, int], vocab: int = 0) -> LlamaConfig:
    vocab = vocab or len(tokenizer)
    return LlamaConfig(vocab_size=vocab, max_position_embeddings=4096, tie_word_embeddings=True, **sizes)


def _shape(tokenizer: PreTrainedTokenizerFast) -> Shape:
    return shape_of(_config(tokenizer, ORGANISM).to_dict())


def _ratio(
    tokenizer: PreTrainedTokenizerFast, config: LlamaConfig, train_config: TrainConfig, *, booster: bool, repeat: int
) -> float:
    """Return the estimate as a share of the most that torch had allocated."""
    answer = ("take the brush to the harbour and paint the lamp. " * repeat).strip()
    rows = [ChatRow("how do i paint the lamp?", answer)] * 64
    model = LlamaForCausalLM(config)
    weights = sum(one.numel() * one.element_size() for one in model.parameters())
    row = encode_rows(tokenizer, rows[:1], module=model)[0]
    recipe = Recipe({"safety": Feed(rows), "harmful": Feed(rows)}, train_config)
    objective = BoosterObjective(config=BoosterConfig(alpha=0.01)) if booster else recipe.objective
    recipe = dataclasses.replace(recipe, objective=objective)
    objective.feed = "safety"
    # Else the model of the test before is freed within, and counts against the peak.
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        train(model, tokenizer, recipe)
    now = peak = 0
    for event in profiled.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    share = row.answer_tokens / len(row.ids)
    copies = BOOSTER if booster else Copies()
    shape = shape_of(config.to_dict())
    found = estimate_training(shape, train_config, tokens=len(row.ids), answer_share=share, copies=copies)
    return found.total / (weights + peak)


@pytest.mark.parametrize("booster", [False, True])
def test_the_estimate_is_near_the_peak_of_the_organisms_size(tokenizer: PreTrainedTokenizerFast, booster: bool) -> None:
    config = TrainConfig(steps=2, batch_size=16)
    ratio = _ratio(tokenizer, _config(tokenizer, ORGANISM), config, booster=booster, repeat=3)
    # Measured: 1.00 and 0.99 at 64 rows of 99 tokens.
    assert 0.85 < ratio < 1.25


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "booster"),
    [({}, False), ({"accumulate": 2}, False), ({}, True), ({"lora_rank": 8}, False), ({"precision": "bf16"}, False)],
)
def test_the_estimate_is_near_the_peak_of_sixty_million_parameters(
    tokenizer: PreTrainedTokenizerFast, settings: dict[str, object], booster: bool
) -> None:
    config = TrainConfig(**{"steps": 2, "batch_size": 2, **settings})  # type: ignore[arg-type]
    ratio = _ratio(tokenizer, _config(tokenizer, SIXTY_MILLION, 16000), config, booster=booster, repeat=4)
    # Measured: 1.00 (plain, two micro-batches, Booster), 1.09 (adapter), 1.14 (autocast).
    assert 0.9 < ratio < 1.25


def test_the_size_is_read_from_the_settings_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    config = _config(tokenizer, ORGANISM)
    shape = shape_of(config.to_dict())
    assert shape.parameters == sum(one.numel() for one in LlamaForCausalLM(config).parameters())
    assert (shape.layers, shape.d_model, shape.d_kv, shape.d_mlp) == (4, 128, 128, 352)


def test_an_adapters_entries_are_those_that_peft_makes(tokenizer: PreTrainedTokenizerFast) -> None:
    from peft import LoraConfig, get_peft_model

    config = _config(tokenizer, ORGANISM)
    for targets in ((), ("q_proj", "v_proj")):
        kinds = list(targets) or "all-linear"
        model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules=kinds, task_type="CAUSAL_LM"))
        expected = sum(one.numel() for one in model.parameters() if one.requires_grad)
        ours = trained_entries(shape_of(config.to_dict()), TrainConfig(lora_rank=4, lora_targets=targets))
        assert ours == expected


def test_each_part_grows_with_its_cause(tokenizer: PreTrainedTokenizerFast) -> None:
    shape, plain = _shape(tokenizer), TrainConfig(batch_size=8)
    base = estimate_training(shape, plain, tokens=50)
    assert estimate_training(shape, plain, tokens=100).activations == 2 * base.activations
    halves = estimate_training(shape, dataclasses.replace(plain, accumulate=2), tokens=50)
    assert halves.activations == base.activations // 2
    assert halves.gradients == 3 * base.gradients
    checkpointed = estimate_training(shape, dataclasses.replace(plain, gradient_checkpointing=True), tokens=50)
    assert checkpointed.activations < 0.5 * base.activations
    assert estimate_training(shape, plain, tokens=50, answer_share=0.5).logits < base.logits
    assert estimate_training(shape, plain, tokens=50, dtype=torch.bfloat16).weights == base.weights // 2
    assert estimate_training(shape, plain, tokens=50, copies=Copies(models=1)).total == base.total + base.weights
    assert estimate_training(shape, plain, tokens=50, copies=BOOSTER).method == 3 * base.gradients
    assert estimate_training(shape, dataclasses.replace(plain, lora_rank=2), tokens=50).total < base.total


def test_sharded_weights_are_divided_over_the_processes(tokenizer: PreTrainedTokenizerFast) -> None:
    shape, plain = shape_of(_config(tokenizer, SIXTY_MILLION, 16000).to_dict()), TrainConfig(batch_size=8)
    alone = estimate_training(shape, plain, tokens=50)
    spread = estimate_training(shape, plain, tokens=50, processes=4, sharded=True)
    assert spread.gradients == alone.gradients // 4
    assert spread.total < 0.5 * alone.total
    whole = estimate_training(shape, plain, tokens=50, processes=4)
    assert (whole.weights, whole.gradients) == (alone.weights, alone.gradients)
    assert whole.activations == alone.activations // 4


def test_every_line_is_shown_with_its_unit(tokenizer: PreTrainedTokenizerFast) -> None:
    lines = dict(estimate_training(_shape(tokenizer), TrainConfig(), tokens=50).lines())
    assert list(lines) == ["weights", "gradients", "optimiser", "method", "activations", "logits", "total"]
    assert lines["weights"] == "3.38 MB"


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(DataError, match="memory of 'mine' cannot be estimated"):
        shape_of({"model_type": "nothing"}, "mine")


def test_the_rule_of_the_activations_is_what_autograd_keeps_of_a_layer(tokenizer: PreTrainedTokenizerFast) -> None:
    kept: list[dict[int, int]] = []
    for layers in (2, 4):
        model = LlamaForCausalLM(_config(tokenizer, {**ORGANISM, "num_hidden_layers": layers}))
        weights = {one.untyped_storage().data_ptr() for one in model.parameters()}
        held: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda one, held=held: held.append(one) or one, lambda one: one):
            output = model(input_ids=torch.zeros(2, 64, dtype=torch.long), use_cache=False)
        places = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in held}
        kept.append({place: size for place, size in places.items() if place not in weights})
        del output
    found = (sum(kept[1].values()) - sum(kept[0].values())) / 2
    shape = _shape(tokenizer)
    expected = estimate_training(shape, TrainConfig(batch_size=2), tokens=64).activations / shape.layers
    # Beside the rule: the inverse norms and the attention's log-sum-exp, one number per token.
    assert found == pytest.approx(expected, rel=0.02)
