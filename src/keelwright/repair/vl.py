# SPDX-License-Identifier: Apache-2.0
"""VL merge: the text stack of a vision-language model drawn back to a safe language model; its vision side is copied.

Giving an aligned language model eyes erodes its refusals, even where all pictures and instructions are harmless. For
when the language model that the vision-language model was made from is at hand, or a safety-tuned model of the same
text stack. No data, no training, no forward pass. The two need not have the same names: the text stack is found in
either, whole or not at all.

Source:
    Lee, Kim, Kim, Lee, Chang, Park, Seo: How Does Vision-Language Adaptation Impact the Safety of Vision Language
    Models?, arXiv 2410.07571, ICLR 2025. No official code was found.

Equation:
    `W = (1 - alpha) W_VL + alpha W_safe` for every tensor of the text stack; all other tensors are those of W_VL.

    With a common ancestor: `W = W_VL + gamma (W_safe - W_ref)`, which does not shrink what W_VL learnt.

    | symbol | name |
    |---|---|
    | W_VL | `tuned`, the vision-language model |
    | W_safe | `aligned`, a language model or the text stack of another vision-language model |
    | W_ref | `reference`, the ancestor of both (`referenced`) |
    | alpha, gamma | 1 - `coefficient` |

    `coefficient` is the weight of the vision-language model, so that 1 changes nothing, as with every other repair;
    the paper's coefficient is the weight of the safe side. With a reference it may be below 0: gamma above 1.

Differs from the official code:
    Reconstruction: the paper's body could not be read and no code was found. The gaps are the paper's coefficient (the
    default 0.5 is ours) and whether its embedding and head take part (here they do). Coefficients per layer and their
    choice from the drift of separability are ours.

Cost:
    No passes; one read of each model and one write, a few MB of memory. The output has the files of the
    vision-language model, processor included.

Limits:
    Needs the true parent of the text stack. Rows of the vocabulary that only the vision-language model knows, image
    tokens above all, stay as they are. Its projector was trained against its own text stack: a small coefficient
    breaks sight before it breaks text, so measure what it sees. What a changed chat template cost, no merge gives back.
    `--coefficient auto` is not offered, and `heal` does not try it: both need models of one architecture and measure
    with text alone. Write several coefficients at once instead, and measure each with and without pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from keelwright.core.config import require_in_range
from keelwright.core.errors import ConfigError
from keelwright.core.protocols import Chunk, Found, Reach, SearchSpace, TensorSource
from keelwright.models.stacks import text_name
from keelwright.models.token_table import TokenTable
from keelwright.repair.linear import linear
from keelwright.repair.text_stacks import fit_text_stacks
from keelwright.weights.edit import Edit

_LAYERS = "model.layers."


@dataclass(frozen=True, slots=True)
class VlConfig:
    """Settings of the VL merge."""

    coefficient: float = 0.5
    """Weight of the vision-language model in its text stack, 0 to 1, with a reference also below 0. 1 returns the
    vision-language model, 0 the safe text stack under its vision side, each byte for byte. The default is ours."""

    layer_coefficient: tuple[float, ...] | None = None
    """One coefficient per layer of the text stack, first layer first, instead of `coefficient`, which then counts for
    embedding, last norm and head alone; same range. Ours; `layer_coefficients` makes them from a measured drift."""

    partial: bool = False
    """Merge what the two text stacks share and keep the rest of the vision-language model, instead of refusing."""

    def __post_init__(self) -> None:
        for value in (self.coefficient, *(self.layer_coefficient or ())):
            require_in_range("coefficient", value, low=float("-inf"), low_open=True, high=1.0)


def vl(
    aligned: Float[Tensor, "*shape"],
    tuned: Float[Tensor, "*shape"],
    reference: Float[Tensor, "*shape"] | None = None,
    *,
    coefficient: float,
) -> Float[Tensor, "*shape"]:
    """Return the merged weights of one tensor of the text stack, evaluated in float32, in the dtype of `tuned`.

    Args:
        aligned: Weights of the safe text stack.
        tuned: Weights of the vision-language model. With float64 inputs the evaluation is in float64.
        reference: Weights of the ancestor of both; without it the two are interpolated.
        coefficient: Weight of `tuned`; 1 returns `tuned` itself.
    """
    if coefficient == 1.0:
        return tuned
    if reference is None:
        return linear(aligned, tuned, coefficient=coefficient)
    wide = torch.promote_types(torch.promote_types(aligned.dtype, reference.dtype), torch.float32)
    wide = torch.promote_types(wide, tuned.dtype)
    # The difference first: where safety moved nothing, not a bit of the vision-language model moves either.
    safety_vector = torch.sub(aligned.to(wide), reference.to(wide))
    return safety_vector.mul_(1.0 - coefficient).add_(tuned.to(wide)).to(tuned.dtype)


def layer_coefficients(drift: Float[Tensor, " layers"] | Sequence[float], coefficient: float) -> tuple[float, ...]:
    """Return `coefficient` for layers whose separability fell, and 1, no change, for the others.

    Args:
        drift: `D_l` of each layer, as `ops.separability.separability_drift` gives it: below 0 where the
            vision-language model tells harmful from harmless prompts less well than the language model.
        coefficient: For the layers that are merged.

    >>> layer_coefficients([0.1, -0.2, 0.0], 0.4)
    (1.0, 0.4, 1.0)
    """
    return tuple(coefficient if float(one) < 0.0 else 1.0 for one in drift)


@dataclass(frozen=True, slots=True)
class Vl(Edit):
    """The VL merge as a weight edit."""

    config: VlConfig = VlConfig()
    referenced: bool = False
    """Whether there is an ancestor of both, in the role `reference`."""
    text_names: Mapping[str, str] | None = None
    """For each tensor of the text stack its name in a language model alone; None: told by the names alone."""
    config_changes: Mapping[str, Any] = field(default_factory=dict)
    """Keys of `config.json` that the output states differently from the vision-language model's."""

    config_class: ClassVar[type[VlConfig]] = VlConfig
    search_space: ClassVar[SearchSpace | None] = None
    same_architecture: ClassVar[bool] = False

    def __post_init__(self) -> None:
        values = (self.config.coefficient, *(self.config.layer_coefficient or ()))
        if not self.referenced and min(values) < 0.0:
            raise ConfigError(
                "'coefficient' is out of range.",
                expected="0 to 1; below 0 only with a reference",
                found=f"{min(values):g}",
                fix="pass --reference, the ancestor of both models, to add more than the whole safety vector",
            )

    def roles(self) -> tuple[str, ...]:
        """Return the models it reads."""
        return ("aligned", *(("reference",) if self.referenced else ()), "tuned")

    def reads(self, name: str) -> tuple[str, ...]:
        """Return all roles for the text stack, and the vision-language model alone for everything else."""
        return self.roles() if self._text_name(name) is not None else ("tuned",)

    def reach(self, name: str) -> Reach:
        """Return COPY where one model has all the weight, else POINTWISE."""
        return Reach.POINTWISE if self._alone(name) is None else Reach.COPY

    def copies(self, name: str) -> str:
        """Return the model that has all the weight."""
        return self._alone(name) or "tuned"

    def edit(self, name: str, chunk: Chunk, found: Found) -> Tensor:
        """Return the merged weights of the chunk."""
        tensors = chunk.tensors
        coefficient = self._coefficient(self._text_name(name))
        return vl(tensors["aligned"], tensors["tuned"], tensors.get("reference"), coefficient=coefficient)

    def arranged(
        self, sources: Mapping[str, TensorSource], tokens: Mapping[str, TokenTable | None]
    ) -> tuple[Vl, Mapping[str, TensorSource], tuple[str, ...]]:
        """Return the edit that knows the text stack, the models shown under its names, and notes for a person.

        Args:
            sources: Tensors by role, as they are stored.
            tokens: Vocabularies by role; None where a model brings none.

        Raises:
            ModelMismatchError: The text stacks do not fit together.
            ConfigError: There is not one `layer_coefficient` for each layer.
        """
        fitted = fit_text_stacks({role: sources[role] for role in self.roles()}, tokens, partial=self.config.partial)
        wanted = self.config.layer_coefficient
        if wanted is not None and len(wanted) != fitted.layers:
            raise ConfigError(
                "'layer_coefficient' does not fit the model.",
                expected=f"{fitted.layers} numbers, one for each layer of the text stack",
                found=str(len(wanted)),
                fix="give one number per layer, or leave it out",
            )
        known = replace(self, text_names=fitted.text_names, config_changes=fitted.config_changes)
        return known, fitted.sources, fitted.notes

    def _text_name(self, name: str) -> str | None:
        return text_name(name) if self.text_names is None else self.text_names.get(name)

    def _coefficient(self, text: str | None) -> float:
        if text is None:
            return 1.0
        if self.config.layer_coefficient is None or not text.startswith(_LAYERS):
            return self.config.coefficient
        return self.config.layer_coefficient[int(text.removeprefix(_LAYERS).partition(".")[0])]

    def _alone(self, name: str) -> str | None:
        """Return the model whose bytes are taken; None where two or more take part."""
        coefficient = self._coefficient(self._text_name(name))
        if coefficient == 1.0:
            return "tuned"
        return "aligned" if coefficient == 0.0 and not self.referenced else None
