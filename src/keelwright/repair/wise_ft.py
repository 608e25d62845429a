# SPDX-License-Identifier: Apache-2.0
"""WiSE-FT: average a zero-shot model with its fine-tune; linear interpolation under its first name.

Here for recipes and comparisons that name it. The same function of the same two models as `linear`, which `heal`
searches; so this offers no search of its own.

Source:
    Wortsman et al.: Robust fine-tuning of zero-shot models, arXiv 2109.01903, CVPR 2022.

Equation:
    `theta = (1 - alpha) theta_0 + alpha theta_1`

    | symbol | name |
    |---|---|
    | theta_0, zero-shot | `aligned` |
    | theta_1, fine-tuned | `tuned` |
    | alpha | `alpha` |

Differs from the official code:
    Nowhere known in the equation; the official code was not compared. Evaluated in float32 and rounded once.

Cost:
    As `linear`: no passes, one read of both models and one write.

Limits:
    As `linear`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from keelwright.core.config import require_in_range
from keelwright.core.protocols import Chunk, Found, Reach, SearchSpace
from keelwright.ops.affine import sum_from_base
from keelwright.weights.edit import Edit


@dataclass(frozen=True, slots=True)
class WiseFtConfig:
    """Settings of WiSE-FT."""

    alpha: float = 0.5
    """Weight of the tuned model, 0 to 1; both ends return that model byte for byte. Source: arXiv 2109.01903, the
    value recommended where there are no data to choose by."""

    def __post_init__(self) -> None:
        require_in_range("alpha", self.alpha, low=0.0, high=1.0)


def wise_ft(
    zero_shot: Float[Tensor, "*shape"], fine_tuned: Float[Tensor, "*shape"], *, alpha: float
) -> Float[Tensor, "*shape"]:
    """Return `(1 - alpha) * zero_shot + alpha * fine_tuned`, in the tensors' dtype.

    Args:
        zero_shot: Weights before tuning, float32 or float64.
        fine_tuned: Weights after it.
        alpha: Weight of `fine_tuned`, 0 to 1.
    """
    return sum_from_base((zero_shot, fine_tuned), (1.0 - alpha, alpha))


@dataclass(frozen=True, slots=True)
class WiseFt(Edit):
    """WiSE-FT as a weight edit."""

    config: WiseFtConfig = WiseFtConfig()

    config_class: ClassVar[type[WiseFtConfig]] = WiseFtConfig
    search_space: ClassVar[SearchSpace | None] = None
    equivalent_to: ClassVar[str] = "linear"
    """With one tuned model it computes the same thing."""

    def roles(self) -> tuple[str, ...]:
        """Return the models it reads."""
        return ("aligned", "tuned")

    def reach(self, name: str) -> Reach:
        """Return COPY at both ends of alpha, else POINTWISE."""
        return Reach.COPY if self.config.alpha in (0.0, 1.0) else Reach.POINTWISE

    def copies(self, name: str) -> str:
        """Return the role that an end of alpha stands for."""
        return "aligned" if self.config.alpha == 0.0 else "tuned"

    def edit(self, name: str, chunk: Chunk, found: Found) -> Tensor:
        """Return the averaged weights of the chunk."""
        return wise_ft(chunk.tensors["aligned"], chunk.tensors["tuned"], alpha=self.config.alpha)

    def combination(self) -> Mapping[str, float]:
        """Return the weight of each role; the edit is their sum."""
        return {"aligned": 1.0 - self.config.alpha, "tuned": self.config.alpha}
