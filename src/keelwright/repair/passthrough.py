# SPDX-License-Identifier: Apache-2.0
"""Passthrough: the tensors of one model, as they are or times a number.

What layers are stacked with in recipes that give each slice its own model. No repair by itself, so there is nothing to
search.

Source:
    Merge method `passthrough` of mergekit 0.1.5 (facts of its documentation).

Equation:
    `out = scale * x`; without a scale the bytes of x

    | symbol | name |
    |---|---|
    | x | `tuned` |
    | scale | `scale` |

Differs from the official code:
    Nowhere known.

Cost:
    No passes; one read and one write.

Limits:
    Exactly one model for each tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from keelwright.core.config import require_in_range
from keelwright.core.protocols import Chunk, Found, Reach, SearchSpace
from keelwright.ops.combine import weighted_sum
from keelwright.ops.per_model import require_models
from keelwright.weights.edit import Edit, tuned_roles


@dataclass(frozen=True, slots=True)
class PassthroughConfig:
    """Settings of passthrough."""

    scale: float | None = None
    """What the weights are multiplied by; any finite number. None: nothing, the bytes are copied."""

    def __post_init__(self) -> None:
        if self.scale is not None:
            require_in_range("scale", self.scale, low_open=True, high_open=True)


def passthrough(tuned: Float[Tensor, "*shape"], *, scale: float | None) -> Float[Tensor, "*shape"]:
    """Return `scale * tuned` in the tensor's dtype; without a scale the tensor itself.

    Args:
        tuned: Weights, float32 or float64.
        scale: What they are multiplied by.
    """
    return tuned if scale is None else weighted_sum((tuned,), (scale,))


@dataclass(frozen=True, slots=True)
class Passthrough(Edit):
    """Passthrough as a weight edit."""

    config: PassthroughConfig = PassthroughConfig()
    models: int = 1
    """Number of models: one."""

    config_class: ClassVar[type[PassthroughConfig]] = PassthroughConfig
    search_space: ClassVar[SearchSpace | None] = None
    min_models: ClassVar[int] = 1
    max_models: ClassVar[int | None] = 1

    def __post_init__(self) -> None:
        require_models("passthrough", self.models, least=1, most=1)

    def roles(self) -> tuple[str, ...]:
        """Return the one model it reads."""
        return tuned_roles(self.models)

    def reach(self, name: str) -> Reach:
        """Return COPY without a scale, else POINTWISE."""
        return Reach.COPY if self.config.scale in (None, 1.0) else Reach.POINTWISE

    def edit(self, name: str, chunk: Chunk, found: Found) -> Tensor:
        """Return the scaled weights of the chunk."""
        return passthrough(chunk.tensors["tuned"], scale=self.config.scale)

    def combination(self) -> Mapping[str, float]:
        """Return the weight of the model."""
        return {"tuned": 1.0 if self.config.scale is None else self.config.scale}
