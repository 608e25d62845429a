# SPDX-License-Identifier: Apache-2.0
"""RESTA_d: thin out the task vector by DARE, then add the safety vector.

For when RESTA alone must be strong enough to cost the task: dropping redundant entries of what tuning changed weakens
its interference with the safety vector, and the rest is rescaled so that its expectation stays.

Source:
    Bhardwaj, Do, Poria: Language Models are Homer Simpson! Safety Re-Alignment of Fine-tuned Language Models through
    Task Arithmetic, arXiv 2402.11746, ACL 2024. Official code: declare-lab/resta. The sparsification is DARE: Yu et
    al., arXiv 2311.03099.

Equation:
    `theta_hat = theta_o + DARE_p(theta_t - theta_o) + gamma (theta_o - theta_u)`,
    `DARE_p(d) = b d / (1 - p)` with `b ~ Bernoulli(1 - p)` for each entry

    | symbol | name |
    |---|---|
    | theta_o | `aligned` |
    | theta_u | `unaligned`, the aligned model with its refusals tuned away |
    | theta_t | `tuned` |
    | gamma | `coefficient`, the strength of the safety vector |
    | p | `drop_rate` |

Differs from the official code:
    Reconstruction: neither the paper's body nor its code could be read. The gaps are gamma, p and the recipe of the
    un-aligned copy; p = 0.2 is what an independent re-implementation uses. That the task vector is thinned out follows
    from how reviews describe the paper; `dare_on: safety` is the other reading, which another library follows.
    Masks come from a counter-based generator keyed by tensor and element, so they do not depend on the order of work.

Cost:
    No passes; three reads and one write of the checkpoint, and one random word per weight.

Limits:
    RESTA's. With `dare_on: task` and a drop rate above 0 no coefficient returns the tuned model: at 0 it is the tuned
    model after DARE alone. High drop rates need small task vectors; full fine-tuning at a high rate breaks beyond
    about 0.5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from keelwright.core.config import require_choice, require_in_range
from keelwright.core.protocols import Chunk, Found, Reach, SearchSpace
from keelwright.ops.philox import Key, keep_randomly, stream_key
from keelwright.repair.resta import resta
from keelwright.weights.edit import Edit

DareOn = Literal["task", "safety"]


@dataclass(frozen=True, slots=True)
class RestaDConfig:
    """Settings of RESTA_d."""

    coefficient: float = 0.5
    """Strength gamma of the safety vector, 0 or more. The paper's value is not known."""
    drop_rate: float = 0.2
    """Share p of entries dropped, 0 <= p < 1. The paper's value is not known; 0 is RESTA."""
    dare_on: DareOn = "task"
    """Which vector is thinned out: `task` (the paper, as its reviews describe it) or `safety`."""
    seed: int = 0
    """Of the masks."""

    def __post_init__(self) -> None:
        require_in_range("coefficient", self.coefficient, low=0.0, high=float("inf"), high_open=True)
        require_in_range("drop_rate", self.drop_rate, low=0.0, high=1.0, high_open=True)
        require_choice("dare_on", self.dare_on, ("task", "safety"))


def resta_d(
    aligned: Float[Tensor, " n"],
    unaligned: Float[Tensor, " n"],
    tuned: Float[Tensor, " n"],
    *,
    coefficient: float,
    drop_rate: float,
    dare_on: DareOn = "task",
    key: Key,
    offset: int = 0,
) -> Float[Tensor, " n"]:
    """Return a run of repaired weights, evaluated in float32 (float64 inputs: in float64).

    Args:
        aligned, unaligned, tuned: Runs of the flattened tensors, all in float32 or float64.
        coefficient: Strength of the safety vector.
        drop_rate: Share of entries dropped; 0 is RESTA to the bit.
        dare_on: Which vector is thinned out.
        key: The tensor's random stream.
        offset: Flat index of the first element.
    """
    if drop_rate == 0.0 or (dare_on == "safety" and coefficient == 0.0):
        return resta(aligned, unaligned, tuned, coefficient=coefficient)
    kept = 1.0 - drop_rate
    safety_vector = torch.sub(aligned, unaligned)
    if dare_on == "safety":
        thin = keep_randomly(safety_vector, probability=kept, key=key, offset=offset, scale=1.0 / kept)
        return thin.mul_(coefficient).add_(tuned)
    thin = keep_randomly(torch.sub(tuned, aligned), probability=kept, key=key, offset=offset, scale=1.0 / kept)
    return thin.add_(aligned).add_(safety_vector.mul_(coefficient))


@dataclass(frozen=True, slots=True)
class RestaD(Edit):
    """RESTA_d as a weight edit."""

    config: RestaDConfig = RestaDConfig()

    config_class: ClassVar[type[RestaDConfig]] = RestaDConfig
    search_space: ClassVar[SearchSpace] = SearchSpace(neutral=0.0, grid=(0.25, 0.5, 1.0))

    def roles(self) -> tuple[str, ...]:
        """Return the models it reads."""
        return ("aligned", "unaligned", "tuned")

    def reach(self, name: str) -> Reach:
        """Return COPY where nothing is dropped from the task vector and nothing is added, else POINTWISE."""
        config = self.config
        unchanged = config.coefficient == 0.0 and (config.drop_rate == 0.0 or config.dare_on == "safety")
        return Reach.COPY if unchanged else Reach.POINTWISE

    def copies(self, name: str) -> str:
        """Return the tuned model."""
        return "tuned"

    def edit(self, name: str, chunk: Chunk, found: Found) -> Tensor:
        """Return the repaired weights of the chunk."""
        tensors, config = chunk.tensors, self.config
        return resta_d(
            tensors["aligned"],
            tensors["unaligned"],
            tensors["tuned"],
            coefficient=config.coefficient,
            drop_rate=config.drop_rate,
            dare_on=config.dare_on,
            key=stream_key(config.seed, config.dare_on, name),
            offset=chunk.offset,
        )
