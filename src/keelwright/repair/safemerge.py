# SPDX-License-Identifier: Apache-2.0
"""SafeMERGE: merge with a safe model only those layers whose tuning left the subspace of alignment.

For when merging the whole model costs too much of the task: layers that stayed inside the subspace keep their tuning.
The safe model may be the aligned one, or a copy of it tuned on refusals (role `reference`, with `referenced`).

Source:
    Djuhera, Kadhe, Ahmed, Zawad, Boche: SafeMERGE: Preserving Safety Alignment in Fine-Tuned Large Language Models via
    Selective Layer-Wise Model Merging, arXiv 2503.17239. Official code: aladinD/SafeMERGE (no licence file).

Equation:
    `V = W_a - W_b`, `D = W_t - W_a`, `C = V V^T / ||V||_F`;
    where `cos(C D, D) < tau`: `W = alpha W_t + (1 - alpha) W_s`, else `W = W_t`

    | symbol | name |
    |---|---|
    | W_b | `base`, the model before alignment |
    | W_a | `aligned` |
    | W_t | `tuned` |
    | W_s | `reference` where `referenced`, else `aligned` |
    | alpha | `coefficient`, the weight of the tuned model |
    | tau | `threshold` |

Differs from the official code:
    The official code adds the factors of two adapters, each scaled by the root of its weight, which adds cross terms to
    the merged product; here weights are merged, and full checkpoints as well. It pairs projections with layers by the
    order in which a model lists them and rounds cosines to five digits; here tensors are paired by name and not
    rounded. Without a reference the safe model is the aligned one: the paper always tunes one.

Cost:
    No passes; three or four reads and one write of the checkpoint, two products of each matrix with the alignment
    matrix. Memory: the largest matrix, a few times.

Limits:
    Needs the base model. Only two-dimensional tensors are merged; embeddings and output heads only on request. When all
    cosines lie above the threshold nothing changes, whatever the coefficient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from keelwright.core.config import require_choice, require_in_range
from keelwright.core.protocols import Chunk, Found, Reach, SearchSpace
from keelwright.ops.combine import weighted_sum
from keelwright.ops.projection import Projector
from keelwright.repair.safe_lora import is_embedding, projected_drift
from keelwright.weights.edit import Edit


@dataclass(frozen=True, slots=True)
class SafemergeConfig:
    """Settings of SafeMERGE."""

    coefficient: float = 0.8
    """Weight alpha of the tuned model in a merged layer, 0 to 1; 1 changes nothing. Released default."""
    threshold: float = 0.35
    """Cosine tau below which a layer is merged, -1 to 1. Released default; the paper also uses up to 0.7."""
    projector: Projector = "safe_lora"
    """`safe_lora`: V V^T / ||V||_F, as released; `exact_topk`: a true projector on the leading directions of V."""
    energy: float = 0.9
    """Only for `exact_topk`: share of ||V||_F^2 that the directions hold, above 0 to 1."""
    embeddings: bool = False
    """Also merge embeddings and output heads."""

    def __post_init__(self) -> None:
        require_in_range("coefficient", self.coefficient, low=0.0, high=1.0)
        require_in_range("threshold", self.threshold, low=-1.0, high=1.0)
        require_choice("projector", self.projector, ("safe_lora", "exact_topk"))
        require_in_range("energy", self.energy, low=0.0, low_open=True, high=1.0)


def safemerge(
    base: Float[Tensor, "rows columns"],
    aligned: Float[Tensor, "rows columns"],
    safe: Float[Tensor, "rows columns"],
    tuned: Float[Tensor, "rows columns"],
    *,
    coefficient: float = 0.8,
    threshold: float = 0.35,
    projector: Projector = "safe_lora",
    energy: float = 0.9,
) -> Float[Tensor, "rows columns"]:
    """Return `coefficient * tuned + (1 - coefficient) * safe` where the cosine is below the threshold, else `tuned`.

    Args:
        base, aligned, safe, tuned: The matrix in each model, float32 or float64; `safe` may be `aligned`.
        coefficient: Weight of the tuned matrix.
        threshold: Cosine from which the layer stays as it is.
        projector: How to project.
        energy: Only for `exact_topk`.
    """
    if coefficient == 1.0:
        return tuned
    _, similarity = projected_drift(base, aligned, tuned, projector=projector, energy=energy)
    if similarity >= threshold:
        return tuned
    return weighted_sum((safe, tuned), (1.0 - coefficient, coefficient), keep_equal=True)


@dataclass(frozen=True, slots=True)
class Safemerge(Edit):
    """SafeMERGE as a weight edit."""

    config: SafemergeConfig = SafemergeConfig()
    referenced: bool = False
    """Whether the safe model is one of its own, in the role `reference`."""

    config_class: ClassVar[type[SafemergeConfig]] = SafemergeConfig
    search_space: ClassVar[SearchSpace] = SearchSpace(neutral=1.0, grid=(0.0, 0.3, 0.6, 0.8))

    def roles(self) -> tuple[str, ...]:
        """Return the models it reads."""
        return ("base", "aligned", *(("reference",) if self.referenced else ()), "tuned")

    def reach(self, name: str) -> Reach:
        """Return COPY where the weight is that of the tuned model alone, else MATRIX."""
        unchanged = self.config.coefficient == 1.0 or (is_embedding(name) and not self.config.embeddings)
        return Reach.COPY if unchanged else Reach.MATRIX

    def edit(self, name: str, chunk: Chunk, found: Found) -> Tensor:
        """Return the matrix, merged where it is chosen; other tensors as tuning left them."""
        tensors, config = chunk.tensors, self.config
        if len(chunk.entry.shape) != 2:
            return tensors["tuned"]
        return safemerge(
            tensors["base"],
            tensors["aligned"],
            tensors["reference" if self.referenced else "aligned"],
            tensors["tuned"],
            coefficient=config.coefficient,
            threshold=config.threshold,
            projector=config.projector,
            energy=config.energy,
        )
