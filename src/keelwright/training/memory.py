# SPDX-License-Identifier: Apache-2.0
"""How much memory a training run will take, from the model's settings alone: nothing is loaded.

    what         bytes
    weights      all of them, in their dtype
    gradients    one per trained weight; three while micro-batches are added up; float32 beside half-precision weights
    optimiser    two moments per trained weight, in its dtype, and what AdamW needs while it steps
    method       what the objective holds: gradients that are kept apart, a copy of the trained weights, frozen models
    activations  of one micro-batch: `8 d_model + 2 d_kv + 4 d_mlp` values per token and layer
    logits       of one micro-batch: as given out and as their gradient, and in float32 on the answer tokens

The activations' rule was read off the tensors that autograd keeps for a Llama (torch 2.13, scaled dot product
attention, which keeps no square of attention weights); other decoders of that build are near it. The sum is what is
allocated at the peak: allocators that keep what was freed, and the libraries themselves (about 0.5 GB), come on top.

Measured on the CPU (60 million parameters, float32): the estimate is 1.00 of the peak for plain tuning, with two
micro-batches and for Booster, 1.09 with an adapter, 1.14 under autocast, 1.17 with gradient checkpointing.

A method says what it holds as `copies: ClassVar[Copies]` of its `Defence`; one that has none holds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from keelwright.core.errors import DataError
from keelwright.models.memory import shown_bytes
from keelwright.models.skeleton import skeleton
from keelwright.training.config import TrainConfig

_NORM_BYTES: Final = 6
"""Per entry of the residual stream and layer: norms keep theirs in float32 beside half-precision activations."""


@dataclass(frozen=True, slots=True)
class Copies:
    """What a method keeps in memory beside plain fine-tuning."""

    gradients: int = 0
    """Gradients of all trained weights that are held at once, beyond the step's own. Booster: 2."""
    weights: int = 0
    """Copies of the trained weights: 1 where weights are moved and copied back, 1 per anchor. Booster, SAM: 1."""
    models: int = 0
    """Frozen copies of the whole model; a reference beside a new adapter needs none."""
    logits: int = 0
    """Further passes whose logits are held beside those of the pass that is differentiated. A divergence: 1."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a decoder's settings say about its size."""

    parameters: int
    """Tied ones once."""
    largest: int
    """Entries of the largest weight."""
    linear: tuple[tuple[str, int, int], ...]
    """Name, inputs and outputs of every linear layer but the head."""
    layers: int
    d_model: int
    d_kv: int
    """Keys' (or values') entries per token and layer."""
    d_mlp: int
    vocab: int


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """Bytes of one process at the peak of a step."""

    weights: int
    gradients: int
    optimiser: int
    method: int
    activations: int
    logits: int
    total: int
    """Less than the sum: the optimiser's work space and the activations are not there at the same time."""

    def lines(self) -> tuple[tuple[str, str], ...]:
        """Return what each part takes, for a plan: name and size."""
        names = ("weights", "gradients", "optimiser", "method", "activations", "logits", "total")
        return tuple((name, shown_bytes(getattr(self, name))) for name in names)


def shape_of(config: Mapping[str, Any], text: str = "config.json") -> Shape:
    """Return a model's size, without its weights.

    Args:
        config: `config.json`.
        text: The user's own words for the model.

    Raises:
        DataError: The settings contradict each other, or transformers knows no such language model.
    """
    module = skeleton(config, text)
    if module is None:
        raise DataError(
            f"The memory of '{text}' cannot be estimated.",
            expected="a causal language model that transformers knows",
            found=f"model_type {config.get('model_type')!r}",
            fix="load the model and train a single step, or leave the estimate out",
        )
    settings: Any = module.config.get_text_config()
    heads = int(settings.num_attention_heads)
    d_head = int(getattr(settings, "head_dim", None) or settings.hidden_size // heads)
    sizes = [one.numel() for one in module.parameters()]
    head = module.get_output_embeddings()
    linear = tuple(
        (name, one.in_features, one.out_features)
        for name, one in module.named_modules()
        if isinstance(one, nn.Linear) and one is not head
    )
    return Shape(
        parameters=sum(sizes),
        largest=max(sizes),
        linear=linear,
        layers=int(settings.num_hidden_layers),
        d_model=int(settings.hidden_size),
        d_kv=d_head * int(getattr(settings, "num_key_value_heads", None) or heads),
        d_mlp=int(getattr(settings, "intermediate_size", None) or 4 * settings.hidden_size),
        vocab=int(settings.vocab_size),
    )


def trained_entries(shape: Shape, config: TrainConfig) -> int:
    """Return how many entries are trained: all, or the factors of the new adapter."""
    if not config.lora_rank:
        return shape.parameters
    targets = config.lora_targets
    return sum(
        config.lora_rank * (inputs + outputs)
        for name, inputs, outputs in shape.linear
        if not targets or any(name == one or name.endswith(f".{one}") for one in targets)
    )


def estimate_training(
    shape: Shape,
    config: TrainConfig,
    *,
    tokens: int,
    answer_share: float = 1.0,
    dtype: torch.dtype = torch.float32,
    copies: Copies = Copies(),
    processes: int = 1,
    sharded: bool = False,
    fused: bool = False,
) -> TrainingMemory:
    """Return what one process needs at the peak of a step.

    Args:
        shape: Of the model.
        config: Batch, accumulation, precision, checkpointing, adapter.
        tokens: Of the longest row, prompt and answer: rows are padded to it.
        answer_share: Share of the tokens that carry loss, 0 to 1.
        dtype: Of the weights.
        copies: What the method holds.
        processes: How many take part.
        sharded: Whether weights are spread over them.
        fused: Whether AdamW steps on all tensors at once, as torch does on a GPU.
    """
    parts = processes if sharded else 1
    size = dtype.itemsize
    trained = trained_entries(shape, config) // parts
    # New factors are float32; gradients are added up in it in any case.
    trained_size = 4 if config.lora_rank else size
    largest = min(shape.largest, trained)
    weights = shape.parameters * size // parts + (trained * trained_size if config.lora_rank else 0)
    if sharded:
        # One layer is whole while it computes, and so are embeddings and head.
        weights += (shape.parameters // max(1, shape.layers) + shape.vocab * shape.d_model) * size
    one_gradient = trained * 4
    gradients = one_gradient * (1 if config.accumulate == 1 else 3)
    moments, stepping = 2 * trained * trained_size, (trained if fused else 2 * largest) * trained_size
    method = copies.gradients * one_gradient + copies.weights * trained * trained_size
    method += copies.models * shape.parameters * size // parts
    rows = -(-config.batch_size // (config.accumulate * processes))
    activations = _activations(shape, config, rows * tokens, size)
    logits = _logits(shape, rows * tokens, answer_share, size, copies.logits)
    # While micro-batches are added up, the activations are gone: only one gradient is there beside them.
    growing = (1 if config.accumulate == 1 else 2) * one_gradient + activations + logits
    # Terms with weights are added up in three further lists: the scaled term, the sum before and the sum after.
    adding = (4 if copies.gradients else 1) * one_gradient
    method_gradients = copies.gradients * one_gradient
    # Half-precision weights get gradients in their dtype; the norm is taken of float32 copies of these.
    cast = trained * trained_size + one_gradient if trained_size < 4 else 0
    stepped = one_gradient + max(cast, stepping + cast - (one_gradient if cast else 0))
    held = weights + moments + method - method_gradients
    total = held + max(growing + method_gradients, gradients + method_gradients, adding + method_gradients, stepped)
    return TrainingMemory(weights, gradients, moments + stepping, method, activations, logits, total)


def _activations(shape: Shape, config: TrainConfig, tokens: int, size: int) -> int:
    """Return the bytes that autograd keeps for the backward pass of one micro-batch."""
    stream, inner = 8 * shape.d_model, 2 * shape.d_kv + 4 * shape.d_mlp
    if config.precision == "bf16":
        # The residual stream stays as the weights are; products are bfloat16, and so are copies of the weights.
        layer = tokens * (stream * size + inner * 2)
        copied = 2 * sum(inputs * outputs for _, inputs, outputs in shape.linear) if size > 2 else 0
    else:
        layer = tokens * ((stream + inner) * size + (_NORM_BYTES * shape.d_model if size < 4 else 0))
        copied = 0
    if config.gradient_checkpointing:
        return layer + copied // max(1, shape.layers) + shape.layers * tokens * shape.d_model * size
    return shape.layers * layer + copied


def _logits(shape: Shape, tokens: int, answer_share: float, size: int, held: int) -> int:
    """Return the bytes of one micro-batch's logits while their gradient is taken."""
    answers = round(tokens * answer_share)
    return shape.vocab * (2 * tokens * size + 2 * answers * 4 + held * answers * 4)
