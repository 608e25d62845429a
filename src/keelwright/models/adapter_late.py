# SPDX-License-Identifier: Apache-2.0
"""Parts of adapters that mean nothing without the base: they are bound to it when an adapter is put on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from keelwright.core.errors import ModelMismatchError
from keelwright.core.protocols import TensorSource
from keelwright.models.adapter_changes import Change, ExpertFactors, LoraFactors, Rotation, Scaling, TokenRows
from keelwright.models.checkpoint import Checkpoint
from keelwright.models.folders import ADAPTER_CONFIG
from keelwright.models.skeleton import skeleton


class Late(Protocol):
    """What an adapter does, once the base is known."""

    def bind(self, base: TensorSource) -> Mapping[str, LoraFactors | Change]:
        """Return the changes by tensor name."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the adapter's own numbers with a name each, for digests."""


@dataclass(frozen=True, slots=True)
class SharedFactors:
    """VeRA: two projections that all layers share, cut to the layer's size and scaled by the layer's own vectors.

    Source:
        VeRA, arXiv 2310.11454.
    """

    text: str
    name: str
    wide_a: Tensor
    """Shape `[rank, inputs]` of the widest layer."""
    tall_b: Tensor
    """Shape `[outputs, rank]` of the tallest layer."""
    outputs: Tensor
    """`b`, one number per output."""
    ranks: Tensor
    """`d`, one number per rank."""
    transposed: bool

    def bind(self, base: TensorSource) -> Mapping[str, LoraFactors | Change]:
        """Return the layer's own sum."""
        entry = base.entries().get(self.name)
        height = self.outputs.numel()
        sizes = entry.shape if entry is not None and len(entry.shape) == 2 else (height, self.wide_a.shape[1])
        # The outputs say which side is which, where the setting speaks for another layer.
        turned = self.transposed if sizes[0] == sizes[1] else sizes[1] == height
        inputs = sizes[0] if turned else sizes[1]
        left = self.outputs.unsqueeze(1) * self.tall_b[:height]
        right = self.ranks.unsqueeze(1) * self.wide_a[:, :inputs]
        one = LoraFactors(left.contiguous(), right.contiguous(), 1.0, "linear")
        return {self.name: one.transposed() if turned else one}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the projections and the vectors."""
        for part in ("wide_a", "tall_b", "outputs", "ranks"):
            yield f"{self.name} {part}", getattr(self, part)


@dataclass(frozen=True, slots=True)
class LateBias:
    """IA3 on one module: its weight, and where outputs are scaled its bias, if it has one."""

    module: str
    vector: Tensor
    by_columns: bool
    of_inputs: bool

    def bind(self, base: TensorSource) -> Mapping[str, LoraFactors | Change]:
        """Return the scaling of the weight, and of the bias where the base has one."""
        name, bias = f"{self.module}.weight", f"{self.module}.bias"
        entry, size = base.entries().get(name), self.vector.numel()
        by_columns = self.by_columns
        if entry is not None and len(entry.shape) == 2 and entry.shape[0] != entry.shape[1]:
            # The length says which side is which, where the setting speaks for another layer.
            by_columns = entry.shape[1] == size
        fits = entry is not None and len(entry.shape) == 2 and entry.shape[1 if by_columns else 0] == size
        found: dict[str, LoraFactors | Change] = {
            name: Scaling(self.vector, entry.shape if fits and entry is not None else (size,), by_columns)
        }
        if not self.of_inputs and bias in base.entries():
            found[bias] = Scaling(self.vector, (size,), by_columns=False)
        return found

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the multipliers."""
        yield f"{self.module} {self.by_columns} {self.of_inputs}", self.vector


@dataclass(frozen=True, slots=True)
class LateRows:
    """Trained rows of an embedding whose height the base knows."""

    name: str
    indices: tuple[int, ...]
    rows: Tensor

    def bind(self, base: TensorSource) -> Mapping[str, LoraFactors | Change]:
        """Return the replacement of the rows."""
        entry = base.entries().get(self.name)
        if entry is None or len(entry.shape) != 2:
            return {self.name: TokenRows(self.indices, self.rows, 0)}
        height = entry.shape[0]
        if len(self.indices) != self.rows.shape[0] or max(self.indices, default=-1) >= height:
            raise ModelMismatchError(
                f"Trained rows do not fit '{self.name}' of '{base.describe()}'.",
                expected=f"{len(self.indices)} rows below {height}",
                found=f"{self.rows.shape[0]} rows for the places {list(self.indices)[:5]}",
                fix=f"pass the base that {ADAPTER_CONFIG} names",
            )
        return {self.name: TokenRows(self.indices, self.rows, height)}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the new rows."""
        yield f"{self.name} {self.indices}", self.rows


@dataclass(frozen=True, slots=True)
class LateRotation:
    """OFT on one layer; a shared block is repeated as often as the layer is wide."""

    name: str
    blocks: Tensor
    shared: bool

    def bind(self, base: TensorSource) -> Mapping[str, LoraFactors | Change]:
        """Return the rotation."""
        entry = base.entries().get(self.name)
        height, width = entry.shape if entry is not None and len(entry.shape) == 2 else (0, 0)
        blocks = self.blocks
        if self.shared:
            blocks = blocks.repeat(max(1, width // blocks.shape[1]), 1, 1)
        return {self.name: Rotation(blocks, height)}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the rotations."""
        yield f"{self.name} {self.shared}", self.blocks


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """`target_parameters` on one module: which parameter each pair of factors belongs to is not in the file.

    PEFT wraps the parameters in the order in which the module registers them; which way round a parameter lies is a
    property of the module (`is_transposed`). Both are taken from the architecture where transformers knows it, else
    from the shapes, and an adapter for which these leave a choice is refused.
    """

    text: str
    module: str
    modules: tuple[str, ...]
    """PEFT's names of the wrappers, innermost first."""
    pairs: tuple[tuple[Tensor, Tensor], ...]
    """`A [rank experts, inputs]` and `B [outputs, rank experts]`, in the same order."""
    wanted: Mapping[str, tuple[int, float]]
    """Rank and scale of each targeted parameter."""

    def bind(self, base: TensorSource) -> Mapping[str, LoraFactors | Change]:
        """Return one change per parameter."""
        order, transposed = self._from_architecture(base)
        found: dict[str, LoraFactors | Change] = {}
        if order is not None and len(order) == len(self.pairs):
            for name, pair in zip(order, self.pairs, strict=True):
                fits = self._fits(base, name, pair, transposed)
                if len(fits) != 1:
                    raise self._unclear(base, name)
                found[f"{self.module}.{name}"] = fits[0]
            return found
        for name in self.wanted:
            fits = [one for pair in self.pairs for one in self._fits(base, name, pair, None)]
            if len(fits) != 1:
                raise self._unclear(base, name)
            found[f"{self.module}.{name}"] = fits[0]
        return found

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all factors."""
        for module, (small_a, small_b) in zip(self.modules, self.pairs, strict=True):
            yield f"{module} A {sorted(self.wanted.items())}", small_a
            yield f"{module} B", small_b

    def _from_architecture(self, base: TensorSource) -> tuple[list[str] | None, bool | None]:
        model = skeleton(base.config_json(), base.describe()) if isinstance(base, Checkpoint) else None
        if model is None:
            return None, None
        try:
            module = model.get_submodule(self.module)
        except AttributeError:
            return None, None
        order = [name for name, _ in module.named_parameters(recurse=False) if name in self.wanted]
        return order, bool(getattr(module, "is_transposed", False))

    def _fits(
        self, base: TensorSource, name: str, pair: tuple[Tensor, Tensor], transposed: bool | None
    ) -> list[LoraFactors | Change]:
        """Return every reading of the pair that has the shape of the parameter."""
        entry = base.entries().get(f"{self.module}.{name}")
        rank, scale = self.wanted[name]
        small_a, small_b = pair
        if entry is None or len(entry.shape) not in (2, 3):
            return []
        if len(entry.shape) == 2:
            fits = (small_b.shape[0], small_a.shape[1]) == entry.shape and small_a.shape[0] == small_b.shape[1] == rank
            return [LoraFactors(small_b, small_a, scale)] if fits else []
        experts = entry.shape[0]
        if small_a.shape[0] != experts * rank or small_b.shape[1] != experts * rank:
            return []
        by_expert_a = small_a.reshape(experts, rank, -1)
        by_expert_b = small_b.reshape(small_b.shape[0], rank, experts).permute(2, 0, 1)
        found: list[LoraFactors | Change] = []
        if transposed is not True and (small_b.shape[0], small_a.shape[1]) == entry.shape[1:]:
            found.append(ExpertFactors(by_expert_b.contiguous(), by_expert_a.contiguous(), scale))
        if transposed is not False and (small_a.shape[1], small_b.shape[0]) == entry.shape[1:]:
            turned = (by_expert_a.transpose(1, 2).contiguous(), by_expert_b.transpose(1, 2).contiguous())
            found.append(ExpertFactors(*turned, scale))
        return found

    def _unclear(self, base: TensorSource, name: str) -> ModelMismatchError:
        entry = base.entries().get(f"{self.module}.{name}")
        shown = f"shape {list(entry.shape)}" if entry else "no such tensor: the base stores its experts one by one"
        pairs = "; ".join(f"A {list(small_a.shape)}, B {list(small_b.shape)}" for small_a, small_b in self.pairs)
        return ModelMismatchError(
            f"The adapter '{self.text}' cannot be placed on '{self.module}.{name}' of '{base.describe()}'.",
            expected=f"one pair of factors that fits it one way round; {shown}",
            found=pairs,
            fix="merge it with PEFT (merge_and_unload), save the full model, and pass that",
        )
