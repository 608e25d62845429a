# SPDX-License-Identifier: Apache-2.0
"""SOMF: learn one mask over the task vectors that keeps what does not fight safety, and fuse what is left.

For when a set of preference pairs (safe answer before unsafe answer) and some training time are there and plain merging
costs too much of the task. Works for one tuned model and for fusing several. The mask is learned once (`prepare`); the
edit that uses it is plain arithmetic and streams.

Source:
    Yi, Zheng, Wang, Wang, He: A safety realignment framework via subspace-oriented model fusion for large language
    models, arXiv 2405.09055. Official code: xinykou/safety_realignment (no licence at its root). The mask: Tang et al.,
    Concrete Subspace Learning (FusionBench); the loss: DPO, arXiv 2305.18290.

Equation:
    `delta_i = theta_i - theta_s`, `delta_i' = delta_i m / mean(m)`, `theta = theta_s + lambda F(delta_1', ...)`,
    `m = sigmoid((x + log u - log(1 - u)) / T)`, u uniform; x minimises the DPO loss over the pairs

    | symbol | name |
    |---|---|
    | theta_s | `aligned` |
    | theta_i | `tuned`, `tuned_2`, ... |
    | x | the mask's logits, 0 at first |
    | T | `temperature` |
    | F | `fusion` |
    | lambda | `coefficient` |

Differs from the official code:
    The code masks the factor matrices of adapters; here the difference of the weights is masked (`space: factors` is
    the code's). Its DPO reference is a second copy that redraws a random mask at every call; here it is frozen, and its
    log-probabilities are computed once. It ignores the coefficient for a single model; here it counts, and is 1. It
    exports by thresholding one draw; here `x > 0` is the default, a draw is `export: sample`. A tensor whose mask has a
    mean below 0.001 keeps the aligned weights instead of being divided by it.

Cost:
    Learning: one forward and one backward pass per step on twice `batch_size` answers, and three float32 copies of the
    masked tensors (logits and two moments), a thousandth of that with tied masks. The edit: no passes.

Limits:
    Preference pairs about safety alone drift towards refusing everything: watch over-refusal, hold pairs out, add
    ordinary examples (`sft_weight`) or safe pairs. No coefficient returns the tuned model. Masks for each entry overfit
    small sets of pairs.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor

from keelwright.core.config import require_choice, require_in_range
from keelwright.core.errors import ConfigError
from keelwright.core.protocols import Chunk, Found, Reach, SearchSpace
from keelwright.ops.concrete import MEAN_FLOOR, Export, Tie, rescaled
from keelwright.repair.ingredients import Ingredients
from keelwright.repair.mask_training import Gates, Learned, MaskLoop, MaskTraining
from keelwright.repair.somf_factors import FactorTasks, read_factor_tasks
from keelwright.weights.edit import Edit, model_roles, tuned_roles
from keelwright.weights.masks import Mask
from keelwright.weights.virtual import Update, VirtualModel

Fusion = Literal["task_arithmetic", "average", "ties"]
Space = Literal["weights", "factors"]
Masked = Literal["all", "matrices", "inner"]

_EMBEDDINGS = ("embed", "wte", "lm_head", "output_layer")


@dataclass(frozen=True, slots=True)
class SomfConfig:
    """Settings of SOMF."""

    coefficient: float = 1.0
    """Strength lambda of the fused task vector, 0 or more; 0 returns the aligned model. The code: 1 for one model, 0.3
    for several (0.4 with `ties`)."""
    fusion: Fusion = "task_arithmetic"
    """How several models are fused: their sum, their mean, or the mean of those entries that agree with the sign of the
    sum. No difference for one model, but for the mean of one being itself."""
    space: Space = "weights"
    """What is masked: `weights`, or the `factors` of LoRA adapters, as in the official code."""
    masked: Masked = "all"
    """Which tensors have a mask: `all` (the code), `matrices`, or `inner`: matrices but embeddings and output heads.
    The others are fused without one."""
    tie: Tie = "entry"
    """Which entries share a logit: `entry` (the code), `row`, `column`, `block` (of a row) or `head` (rows)."""
    block_size: int = 64
    """Entries of a `block`, or rows of a `head`; at least 1."""
    export: Export = "mode"
    """How logits become the mask: `mode` (x > 0), `sample` (the code) or `mean` (the sigmoid)."""
    reference: Literal["aligned", "fused"] = "aligned"
    """DPO's frozen reference: the aligned model, or the fusion without a mask."""
    beta: float = 0.1
    """Strength of DPO's pull towards the reference, above 0. From the code."""
    temperature: float = 0.5
    """Of the relaxed mask, above 0. From the code."""
    final_temperature: float = 0.5
    """At the last step; equal to `temperature` (the code) there is no annealing."""
    straight_through: bool = False
    """Use bits in the forward pass and the relaxed mask's gradient."""
    steps: int = 500
    """Optimiser steps, at least 1. Released masks were taken after 500 to 800."""
    batch_size: int = 16
    """Pairs per step, at least 1. From the code."""
    lr: float = 5e-3
    """Highest learning rate of the logits, above 0. The code: 1e-3 to 1e-2."""
    warmup_steps: int = 0
    """Steps over which the rate rises from 0; after them it falls to 0 along half a cosine."""
    sft_weight: float = 0.0
    """Weight of the mean loss on ordinary examples, in nats per token; 0 (the code) needs none."""
    held_out_share: float = 0.1
    """Share of the prompts on which the mask is only measured, 0 <= share < 1."""
    check_every: int = 50
    """Steps between measurements and checkpoints, at least 1."""
    patience: int = 0
    """Measurements without a lower held-out loss after which learning stops; 0 never stops early."""
    seed: int = 0
    """Of the draws, the order of the pairs and the export `sample`."""

    def __post_init__(self) -> None:
        require_in_range("coefficient", self.coefficient, low=0.0, high=float("inf"), high_open=True)
        require_choice("fusion", self.fusion, ("task_arithmetic", "average", "ties"))
        require_choice("space", self.space, ("weights", "factors"))
        require_choice("masked", self.masked, ("all", "matrices", "inner"))
        require_choice("tie", self.tie, ("entry", "row", "column", "block", "head"))
        require_choice("export", self.export, ("mode", "sample", "mean"))
        require_choice("reference", self.reference, ("aligned", "fused"))
        for name in ("block_size", "steps", "batch_size", "check_every"):
            require_in_range(name, getattr(self, name), low=1)
        for name in ("beta", "temperature", "final_temperature", "lr"):
            require_in_range(name, getattr(self, name), low=0.0, low_open=True)
        for name in ("warmup_steps", "sft_weight", "patience"):
            require_in_range(name, getattr(self, name), low=0)
        require_in_range("held_out_share", self.held_out_share, low=0.0, high=1.0, high_open=True)

    def training(self) -> MaskTraining:
        """Return what the training loop needs."""
        names = {name: value for name, value in asdict(self).items() if name in MaskTraining.__slots__}
        return MaskTraining(**names, size=self.block_size)


def fuse(
    vectors: Sequence[Float[Tensor, "*shape"]], gate: Float[Tensor, "*shape"] | None, *, fusion: Fusion
) -> Float[Tensor, "*shape"]:
    """Return the fused task vector; differentiable in the gate.

    Args:
        vectors: Task vectors, one per model.
        gate: The mask divided by its mean, the same for all models; None fuses them as they are.
        fusion: How several are fused.
    """
    gated = [one if gate is None else one * gate for one in vectors]
    total = gated[0]
    for one in gated[1:]:
        total = total + one
    if fusion == "task_arithmetic" or len(gated) == 1:
        return total
    if fusion == "average":
        return total / len(gated)
    # The election itself has no gradient.
    agree = [torch.where(total.detach() >= 0.0, one > 0.0, one < 0.0) for one in gated]
    count = torch.stack(agree).sum(dim=0).clamp_min(1)
    kept = [torch.where(yes, one, torch.zeros_like(one)) for yes, one in zip(agree, gated, strict=True)]
    return torch.stack(kept).sum(dim=0) / count


def somf(
    aligned: Float[Tensor, "*shape"],
    tuned: Sequence[Float[Tensor, "*shape"]],
    mask: Float[Tensor, "*shape"] | None,
    *,
    coefficient: float = 1.0,
    fusion: Fusion = "task_arithmetic",
) -> Float[Tensor, "*shape"]:
    """Return the fused tensor from whole tensors; the aligned one where the mask's mean is below 0.001.

    Args:
        aligned: Weights of the aligned model, float32 or float64.
        tuned: Weights of the tuned models.
        mask: 0 to 1; None fuses without one.
        coefficient: Strength of the fused task vector.
        fusion: How several are fused.
    """
    gate = None if mask is None else rescaled(mask)
    return aligned + coefficient * fuse([one - aligned for one in tuned], gate, fusion=fusion)


def is_masked(name: str, shape: tuple[int, ...], masked: Masked) -> bool:
    """Tell whether a tensor has a mask of its own."""
    if masked == "all":
        return True
    return len(shape) > 1 and (masked == "matrices" or not any(word in name for word in _EMBEDDINGS))


@dataclass(frozen=True, slots=True)
class Somf(Edit):
    """SOMF as a weight edit; `prepare` learns its mask."""

    config: SomfConfig = SomfConfig()
    models: int = 1
    mask: Mask | None = None
    """Learned, or read from a file."""
    factors: FactorTasks | None = None
    """Only with `space: factors`: the adapters' factors."""

    config_class: ClassVar[type[SomfConfig]] = SomfConfig
    search_space: ClassVar[SearchSpace] = SearchSpace(neutral=1.0, grid=(1.0, 0.75, 0.5))
    min_models: ClassVar[int] = 1
    max_models: ClassVar[int | None] = None
    ingredients: ClassVar[tuple[str, ...]] = ("preferences",)

    def roles(self) -> tuple[str, ...]:
        """Return the models it reads."""
        return ("aligned", *tuned_roles(self.models))

    def reach(self, name: str) -> Reach:
        """Return COPY where the aligned weights stay, else POINTWISE."""
        copied = self.config.coefficient == 0.0
        if self.factors is not None:
            copied = copied or name not in self.factors.names
        return Reach.COPY if copied else Reach.POINTWISE

    def copies(self, name: str) -> str:
        """Return the aligned model."""
        return "aligned"

    def shares(self) -> Hashable:
        """Return None: nothing is reduced."""
        return None

    def edit(self, name: str, chunk: Chunk, found: Found) -> Tensor:
        """Return the fused weights of the chunk."""
        config, mask = self.config, self._learned()
        aligned = chunk.tensors["aligned"]
        if self.factors is not None:
            gates = {part: self._whole(part) for part in mask.shapes if part.rpartition(".")[0] == name}
            change = self.factors.change(name, gates, config.coefficient, lambda v, g: fuse(v, g, fusion=config.fusion))
            return change.apply(torch.zeros_like(aligned), chunk.offset, chunk.offset + aligned.numel()) + aligned
        vectors = [chunk.tensors[role] - aligned for role in model_roles(self.models)]
        gate = None
        if name in mask.logits:
            mean = mask.mean(name, export=config.export, seed=config.seed)
            if mean < MEAN_FLOOR:
                return aligned
            stop = chunk.offset + aligned.numel()
            values = mask.values(name, chunk.offset, stop, export=config.export, seed=config.seed)
            gate = values.to(aligned.dtype) / mean
        return aligned + config.coefficient * fuse(vectors, gate, fusion=config.fusion)

    def prepare(self, ingredients: Ingredients) -> Self:
        """Return the edit with a mask learned from preference pairs.

        Args:
            ingredients: The live tuned model, a source for each role, and `preferences`; `examples` where `sft_weight`
                is above 0. With a folder, a run that was killed goes on from its last checkpoint.

        Raises:
            DataError: There are no pairs.
            ConfigError: `space: factors` without adapters.
            NumericalError: The loss is not finite.
        """
        ingredients.require(*self.ingredients)
        loop, factors = self._loop(ingredients)
        learned = loop.run()
        mask = Mask(
            learned.logits,
            dict(loop.shapes),
            self.config.tie,
            self.config.block_size,
            self.config.final_temperature,
            _recipe(self.config, learned),
        )
        return replace(self, mask=mask, factors=factors)

    def _loop(self, ingredients: Ingredients) -> tuple[MaskLoop, FactorTasks | None]:
        config, sources = self.config, ingredients.sources
        tuned = [sources[role] for role in model_roles(self.models)]
        if config.space == "factors":
            tasks = read_factor_tasks(sources["aligned"], tuned)
            virtual = VirtualModel(ingredients.module, tasks.base, (), select=tasks.names)

            def combine(vectors: Sequence[Tensor], gate: Tensor | None) -> Tensor:
                return fuse(vectors, gate, fusion=config.fusion)

            def of_factors(gates: Gates) -> Update:
                return tasks.update(gates, config.coefficient, combine)

            reference = tasks.update({}, 0.0 if config.reference == "aligned" else config.coefficient, combine)
            loop = MaskLoop(virtual, tasks.shapes(), of_factors, reference, config.training(), ingredients)
            return loop, tasks
        virtual = VirtualModel(ingredients.module, sources["aligned"], tuned)
        shapes = {
            name: tuple(one.base.shape)
            for name, one in virtual.vectors.items()
            if is_masked(name, tuple(one.base.shape), config.masked)
        }

        def of_weights(gates: Gates) -> Update:
            return _update(gates, config.coefficient, config.fusion)

        reference = _update({}, 0.0 if config.reference == "aligned" else config.coefficient, config.fusion)
        return MaskLoop(virtual, shapes, of_weights, reference, config.training(), ingredients), None

    def _whole(self, part: str) -> Tensor:
        mask, config = self._learned(), self.config
        shape = mask.shapes[part]
        count = torch.Size(shape).numel()
        return mask.values(part, 0, count, export=config.export, seed=config.seed).view(shape)

    def _learned(self) -> Mask:
        if self.mask is None:
            raise ConfigError(
                "SOMF has no mask yet.",
                expected="a mask learned from preference pairs, or read from a file",
                found="neither",
                fix="give preference pairs, or the mask that an earlier run wrote",
            )
        return self.mask


def _update(gates: Gates, coefficient: float, fusion: Fusion) -> Update:
    def update(name: str, base: Tensor, deltas: tuple[Tensor, ...]) -> Tensor:
        if coefficient == 0.0:
            return base
        gate = rescaled(gates[name]) if name in gates else None
        return base + coefficient * fuse(deltas, gate, fusion=fusion)

    return update


def _recipe(config: SomfConfig, learned: Learned) -> Mapping[str, object]:
    return {
        "method": "somf",
        "settings": asdict(config),
        "steps": len(learned.losses),
        "last_loss": learned.losses[-1] if learned.losses else None,
        "checks": [dict(one) for one in learned.checks],
    }
