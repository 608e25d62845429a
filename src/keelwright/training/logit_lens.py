# SPDX-License-Identifier: Apache-2.0
"""Logit lens: what each layer's hidden state would say if the model's own norm and head read it.

The projection onto the vocabulary is the largest tensor of such a loss: here it exists for one piece of the tokens at
a time, and is computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from keelwright.core.errors import ConfigError
from keelwright.training.sites import blocks

PIECE: Final = 1024
"""Tokens that are projected onto the vocabulary at a time."""

_NORMS: Final = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f")
_MLPS: Final = ("mlp", "feed_forward", "ffn", "block_sparse_moe")


class Lens:
    """The head of a model, put on hidden states of any layer.

    Args:
        module: A decoder-only language model.

    Raises:
        ConfigError: Its final norm or its head is not found.
    """

    def __init__(self, module: PreTrainedModel) -> None:
        decoder = _decoder(module)
        norm = next((one for name in _NORMS if (one := getattr(decoder, name, None)) is not None), None)
        head = module.get_output_embeddings()
        if norm is None or head is None:
            raise _unknown(module, "a final norm and an output head", "no norm" if head is not None else "no head")
        self.norm: Callable[[Tensor], Tensor] = norm
        self.head: Callable[[Tensor], Tensor] = head

    def cross_entropy(
        self,
        states: Float[Tensor, "tokens d_model"],
        targets: Int[Tensor, " tokens"],
        *,
        normed: bool = False,
        piece: int = PIECE,
    ) -> Float[Tensor, ""]:
        """Return the summed cross entropy of the next tokens, in nats; evaluated in float32.

        Args:
            states: Hidden states at the positions before the targets.
            targets: Token ids.
            normed: The states went through the final norm already, as the last ones of transformers did.
            piece: Tokens that are projected at a time.
        """
        parts = zip(states.split(piece), targets.split(piece), strict=True)
        if len(targets) <= piece:
            return self._piece(states, targets, normed)
        total = states.new_zeros((), dtype=torch.float32)
        for some, wanted in parts:
            total = total + checkpoint(self._piece, some, wanted, normed, use_reentrant=False, preserve_rng_state=False)
        return total

    def _piece(self, states: Tensor, targets: Tensor, normed: bool) -> Tensor:
        logits = self.head(states if normed else self.norm(states))
        return nn.functional.cross_entropy(logits.float(), targets, reduction="sum")


@contextmanager
def mlp_outputs(module: PreTrainedModel, layers: Sequence[int]) -> Iterator[Mapping[int, Tensor]]:
    """Yield a map that holds what the MLP blocks of the layers returned last, with its graph; the hooks are removed.

    Args:
        module: A decoder-only language model.
        layers: Which layers, counted from 0.

    Raises:
        ConfigError: There is no such layer, or it has no MLP block.
    """
    found: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[[nn.Module, object, object], None]:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if isinstance(value, Tensor):
                found[layer] = value

        return hook

    handles = [block.register_forward_hook(keep(layer)) for layer, block in mlp_blocks(module, layers).items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def mlp_blocks(module: PreTrainedModel, layers: Sequence[int]) -> dict[int, nn.Module]:
    """Return the MLP block of each of the layers.

    Raises:
        ConfigError: There is no such layer, or it has no MLP block.
    """
    stack = list(blocks(module).values())
    found: dict[int, nn.Module] = {}
    for layer in layers:
        if not 0 <= layer < len(stack):
            raise ConfigError(
                f"The model has no layer {layer}.",
                expected=f"layers from 0 to {len(stack) - 1}",
                found=str(layer),
                fix="choose layers that the model has",
            )
        block = next((one for name in _MLPS if (one := getattr(stack[layer], name, None)) is not None), None)
        if block is None:
            raise _unknown(module, f"an MLP block in layer {layer}", ", ".join(dict(stack[layer].named_children())))
        found[layer] = block
    return found


def layer_count(module: PreTrainedModel) -> int:
    """Return how many layers the decoder has."""
    return len(blocks(module))


def _decoder(module: PreTrainedModel) -> nn.Module:
    decoder: nn.Module = getattr(module, module.base_model_prefix, module)
    # Vision-language models, and decoders inside a wrapper, hold the text stack one level down.
    for name in ("language_model", "decoder"):
        decoder = getattr(decoder, name, decoder)
    return decoder


def _unknown(module: PreTrainedModel, expected: str, found: str) -> ConfigError:
    return ConfigError(
        f"The parts of {type(module).__name__} are not known.",
        expected=expected,
        found=found,
        fix="use a decoder-only model of a known architecture, such as Llama, Qwen, Mistral, Gemma or GPT-2",
    )
