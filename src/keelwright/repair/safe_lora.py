# SPDX-License-Identifier: Apache-2.0
"""Safe LoRA: project what tuning changed on the subspace that alignment changed, where the two disagree.

For when the model from before alignment is at hand as well: no data, no training, no forward pass. Works on the
factors of an adapter (`project_adapter`) and on the difference of full checkpoints (the edit).

Source:
    Hsu, Tsai, Lin, Chen, Yu, Huang: Safe LoRA: the Silver Lining of Reducing Safety Risks when Fine-tuning Large
    Language Models, arXiv 2405.16833, NeurIPS 2024. Official code: IBM/SafeLoRA.

Equation:
    `V = W_a - W_b`, `D = W_t - W_a`, `C = V V^T / ||V||_F`;
    where `cos(C D, D) <= tau`: `W = W_a + C D`, else `W = W_t`

    | symbol | name |
    |---|---|
    | W_b | `base`, the model before alignment |
    | W_a | `aligned` |
    | W_t | `tuned` |
    | tau | `threshold` |
    | C | `projector`; `exact_topk` is `U_k U_k^T` with the leading left singular vectors of V |

Differs from the official code:
    Projected factors and the choice of layers equal those of commit d81fda1 within 1e-8 on a small adapter. Tensors are
    paired by name, not by the order in which two models list them; everything is float32 (users report that 16-bit
    arithmetic changes the choice of layers and the text); cosines are not rounded to five digits; `C` is never formed
    where that is dearer; `number` takes exactly that many matrices. Full differences are projected as factors are.
    `exact_topk` is ours: the paper's C is no projection (its scale grows with `||V||_F`).

Cost:
    No passes; three reads and one write of the checkpoint, and two products of each matrix with the alignment matrix;
    `number` reads everything twice. Memory: the largest matrix, a few times. `exact_topk` adds an eigenvalue problem
    of the shorter side.

Limits:
    Needs the base model. Where alignment changed little, C shrinks the drift towards 0, and with it the task. Only
    two-dimensional tensors are projected; embeddings and output heads only on request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor

from keelwright.core.config import require_choice, require_in_range
from keelwright.core.errors import ModelMismatchError
from keelwright.core.protocols import Chunk, Found, Reach, SearchSpace, Stats, TensorEntry, TensorSource, WeightEdit
from keelwright.models.adapters import LoraFactors
from keelwright.ops.projection import Projector, cosine, project_on
from keelwright.weights.edit import Edit

Selection = Literal["threshold", "number"]

_ROLES = ("base", "aligned", "tuned")
_EMBEDDINGS = ("embed", "wte", "lm_head", "output_layer")


@dataclass(frozen=True, slots=True)
class SafeLoraConfig:
    """Settings of Safe LoRA."""

    threshold: float = 0.5
    """Cosine tau up to which a matrix is projected, -1 to 1. -1 projects none, 1 all. Default of the official code."""
    selection: Selection = "threshold"
    """`threshold`, or `number`: the matrices of lowest cosine, whatever it is."""
    number: int = 10
    """Only for `number`: how many matrices, at least 0. Default of the official code."""
    projector: Projector = "safe_lora"
    """`safe_lora`: V V^T / ||V||_F; `exact_topk`: a true projector on the leading directions of V."""
    energy: float = 0.9
    """Only for `exact_topk`: share of ||V||_F^2 that the directions hold, above 0 to 1."""
    embeddings: bool = False
    """Also project embeddings and output heads."""

    def __post_init__(self) -> None:
        require_in_range("threshold", self.threshold, low=-1.0, high=1.0)
        require_choice("selection", self.selection, ("threshold", "number"))
        require_in_range("number", self.number, low=0)
        require_choice("projector", self.projector, ("safe_lora", "exact_topk"))
        require_in_range("energy", self.energy, low=0.0, low_open=True, high=1.0)


def is_embedding(name: str) -> bool:
    """Tell whether a tensor is an embedding or an output head, by its name."""
    return any(word in name for word in _EMBEDDINGS)


def projected_drift(
    base: Float[Tensor, "rows columns"],
    aligned: Float[Tensor, "rows columns"],
    tuned: Float[Tensor, "rows columns"],
    *,
    projector: Projector = "safe_lora",
    energy: float = 0.9,
) -> tuple[Float[Tensor, "rows columns"], float]:
    """Return the projected drift `C D` and its cosine with the drift; 1 where there is no drift.

    Args:
        base, aligned, tuned: The matrix in each model, float32 or float64.
        projector: How to project.
        energy: Only for `exact_topk`.
    """
    drift = tuned - aligned
    inside = project_on(aligned - base, drift, projector=projector, energy=energy)
    return inside, cosine(inside, drift) if bool(drift.any()) else 1.0


def safe_lora(
    base: Float[Tensor, "rows columns"],
    aligned: Float[Tensor, "rows columns"],
    tuned: Float[Tensor, "rows columns"],
    *,
    threshold: float = 0.5,
    projector: Projector = "safe_lora",
    energy: float = 0.9,
) -> Float[Tensor, "rows columns"]:
    """Return `aligned + C (tuned - aligned)` where the cosine is at most the threshold, else `tuned` itself.

    Args:
        base, aligned, tuned: The matrix in each model, float32 or float64.
        threshold: Cosine up to which the drift is projected; -1 projects nothing.
        projector: How to project.
        energy: Only for `exact_topk`.
    """
    if threshold <= -1.0:
        return tuned
    inside, similarity = projected_drift(base, aligned, tuned, projector=projector, energy=energy)
    return aligned + inside if similarity <= threshold else tuned


def factored_cosine(
    inside: Float[Tensor, "rows rank"], left: Float[Tensor, "rows rank"], right: Float[Tensor, "rank columns"]
) -> float:
    """Return the cosine of `inside @ right` and `left @ right` from products of rank by rank.

    Args:
        inside: The projected left factor.
        left, right: The factors.
    """
    a, b, core = inside.double(), left.double(), right.double() @ right.double().T
    mixed, own, other = (float(((x.T @ y) * core).sum()) for x, y in ((a, b), (a, a), (b, b)))
    if own <= 0.0 or other <= 0.0:
        return 1.0 if other <= 0.0 else 0.0
    return min(1.0, max(-1.0, mixed / (own * other) ** 0.5))


def project_adapter(
    factors: Mapping[str, LoraFactors], base: TensorSource, aligned: TensorSource, config: SafeLoraConfig | None = None
) -> tuple[dict[str, LoraFactors], dict[str, float]]:
    """Return the adapter with the left factors of the chosen layers projected, and the cosine of every layer.

    Args:
        factors: What the adapter adds to the aligned model, by tensor name; right factors, ranks and scales stay.
        base: The model before alignment.
        aligned: The model that the adapter sits on.
        config: Settings; `embeddings` decides about adapted embeddings here as well.

    Raises:
        ModelMismatchError: A model lacks a tensor that the adapter changes, or has it in another shape.
    """
    config = config or SafeLoraConfig()
    projected: dict[str, LoraFactors] = {}
    similarity: dict[str, float] = {}
    for name, one in factors.items():
        if is_embedding(name) and not config.embeddings:
            continue
        subspace = _matrix(aligned, name, one.shape) - _matrix(base, name, one.shape)
        left = one.left.float()
        inside = project_on(subspace, left, projector=config.projector, energy=config.energy)
        similarity[name] = factored_cosine(inside, left, one.right)
        projected[name] = LoraFactors(inside, one.right, one.scale)
    chosen = choose(similarity, config)
    return {name: projected[name] if name in chosen else one for name, one in factors.items()}, similarity


def choose(similarity: Mapping[str, float], config: SafeLoraConfig) -> frozenset[str]:
    """Return the names of the matrices to project.

    Args:
        similarity: Cosine of each matrix with its projection.
        config: Threshold or number; among equal cosines the first names come first.
    """
    if config.selection == "threshold":
        none = config.threshold <= -1.0
        return frozenset(name for name, value in similarity.items() if not none and value <= config.threshold)
    order = sorted(similarity, key=lambda name: (similarity[name], name))
    return frozenset(order[: config.number])


def _matrix(source: TensorSource, name: str, shape: tuple[int, int]) -> Float[Tensor, "rows columns"]:
    entry = source.entries().get(name)
    if entry is None or entry.shape != shape:
        raise ModelMismatchError(
            f"The adapter does not fit '{source.describe()}' at '{name}'.",
            expected=f"a tensor of shape {list(shape)}",
            found="no such tensor" if entry is None else f"shape {list(entry.shape)}",
            fix="pass the models that the adapter was made for: the aligned one, and its own base",
        )
    return source.read(name, 0, entry.elements).float().view(shape)


@dataclass(frozen=True, slots=True)
class Similarities(Edit):
    """The survey that finds every matrix's cosine; its statistics are the matrix's rows, strung together."""

    projector: Projector
    energy: float
    embeddings: bool

    def roles(self) -> tuple[str, ...]:
        """Return the models it reads."""
        return _ROLES

    def reach(self, name: str) -> Reach:
        """Return ROWS, or COPY, which reads nothing, for tensors that cannot be chosen."""
        return Reach.COPY if is_embedding(name) and not self.embeddings else Reach.ROWS

    def passes(self, name: str) -> int:
        """Return one pass over the rows."""
        return 1

    def reduce(self, name: str, chunk: Chunk, found: Found) -> Stats:
        """Return the rows of each model as tuples, which add up to the whole matrix; nothing for other tensors."""
        if len(chunk.entry.shape) != 2:
            return {}
        return {role: (chunk.tensors[role].clone(),) for role in _ROLES}

    def settle(self, entry: TensorEntry, sums: Stats, found: Found) -> Found:
        """Return the cosine, and whether there is any drift at all."""
        if len(entry.shape) != 2:
            return {}
        base, aligned, tuned = (torch.cat(sums[role]) for role in _ROLES)
        _, similarity = projected_drift(base, aligned, tuned, projector=self.projector, energy=self.energy)
        return {"cosine": similarity, "moved": bool((tuned != aligned).any())}


@dataclass(frozen=True, slots=True)
class SafeLora(Edit):
    """Safe LoRA on full weights, as a weight edit."""

    config: SafeLoraConfig = SafeLoraConfig()
    chosen: frozenset[str] | None = None
    """What the survey chose; None until then, and with a threshold."""

    config_class: ClassVar[type[SafeLoraConfig]] = SafeLoraConfig
    search_space: ClassVar[SearchSpace] = SearchSpace(neutral=-1.0, grid=(0.3, 0.5, 0.7, 0.9, 1.0), setting="threshold")

    def roles(self) -> tuple[str, ...]:
        """Return the models it reads."""
        return _ROLES

    def reach(self, name: str) -> Reach:
        """Return MATRIX, or COPY where the tensor cannot be chosen."""
        config = self.config
        none = config.threshold <= -1.0 if config.selection == "threshold" else config.number == 0
        passed = self.chosen is not None and name not in self.chosen
        return Reach.COPY if none or passed or (is_embedding(name) and not config.embeddings) else Reach.MATRIX

    def edit(self, name: str, chunk: Chunk, found: Found) -> Tensor:
        """Return the matrix with its drift projected where it is chosen; other tensors as tuning left them."""
        base, aligned, tuned = (chunk.tensors[role] for role in _ROLES)
        if len(chunk.entry.shape) != 2:
            return tuned
        threshold = self.config.threshold if self.chosen is None else 1.0
        return safe_lora(
            base, aligned, tuned, threshold=threshold, projector=self.config.projector, energy=self.config.energy
        )

    def survey(self) -> WeightEdit | None:
        """Return the search for the lowest cosines where a number of matrices is wanted."""
        if self.config.selection == "threshold" or self.chosen is not None:
            return None
        return Similarities(self.config.projector, self.config.energy, self.config.embeddings)

    def surveyed(self, found: Mapping[str, Found]) -> Self:
        """Return the edit that knows which matrices it projects."""
        moved = {name: float(one["cosine"]) for name, one in found.items() if one.get("moved")}
        return replace(self, chosen=choose(moved, self.config))
