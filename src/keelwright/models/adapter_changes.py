# SPDX-License-Identifier: Apache-2.0
"""What an adapter does to one stored tensor, each kind evaluated by blocks of rows.

Every kind is a small frozen object that holds the adapter's own numbers, in the layout of the stored tensor. None forms
more than one block of rows of the tensor, except the Kronecker product, whose second factor is formed once (it is at
most `1 / rows(first)` of the tensor). The bits of a result do not depend on the range that is asked for: rows are
always taken in the same blocks, because a matrix product of another height may take another path through the library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 16
"""Elements per block of rows; part of the result's bits."""


Layout = Literal["linear", "transposed", "embedding"]
"""`linear`: the tensor is `[outputs, inputs]`; `transposed`: `[inputs, outputs]`, as in Conv1D."""


class Below(Protocol):
    """What lies under a change: the tensor without any adapter, and as the changes before this one leave it."""

    def base(self, start: int, stop: int) -> Tensor:
        """Return elements `start:stop` of the base's own tensor in float32."""

    def before(self, start: int, stop: int) -> Tensor:
        """Return elements `start:stop` as the changes before this one leave them, in float32."""

    def remember(self, make: Callable[[], Tensor]) -> Tensor:
        """Return what `make` returned the first time it was needed for this change."""


@runtime_checkable
class Change(Protocol):
    """What an adapter does to one tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the stored tensor."""

    def apply(self, values: Tensor, start: int, stop: int, below: Below) -> Tensor:
        """Return elements `start:stop` after the change; `values` (before it, float32) may be overwritten."""

    def settings(self) -> str:
        """Return what tells two changes with equal tensors apart."""

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the adapter's own numbers, for digests."""


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """What an adapter adds to one tensor: `scale * left @ right`, in the layout of the stored tensor."""

    left: Tensor
    """Shape `[rows, rank]`: `B` of a linear layer."""
    right: Tensor
    """Shape `[rank, columns]`: `A` of a linear layer."""
    scale: float
    """`alpha / rank`, or `alpha / sqrt(rank)` for rank-stabilised LoRA."""
    layout: Layout | None = None
    """The layer that it was trained on, where known: what the factors are called when they are written again."""

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the tensor that is added to."""
        return (self.left.shape[0], self.right.shape[1])

    @property
    def rank(self) -> int:
        """Number of columns of `left`."""
        return self.left.shape[1]

    def delta(self, start_row: int = 0, stop_row: int | None = None) -> Tensor:
        """Return rows `start_row:stop_row` of what is added, in float32."""
        return self.scale * (self.left[start_row:stop_row].float() @ self.right.float())

    def transposed(self) -> LoraFactors:
        """Return the same sum for a tensor that is stored the other way round."""
        turned: dict[Layout | None, Layout] = {"linear": "transposed", "transposed": "linear"}
        layout = turned.get(self.layout, self.layout)
        return LoraFactors(self.right.T.contiguous(), self.left.T.contiguous(), self.scale, layout)

    def apply(self, values: Tensor, start: int, stop: int, below: Below | None = None) -> Tensor:
        """Return elements `start:stop` with the sum added, in place."""
        return _add(values, start, stop, *self.shape, self.delta)

    def settings(self) -> str:
        """Return the scale."""
        return repr(self.scale)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return both factors."""
        return (self.left, self.right)


@dataclass(frozen=True, slots=True)
class Dora:
    """Weight-decomposed LoRA: the direction is that of `base + sum`, the length is the adapter's own.

    `W' = m * (W + s B A) / ||base + s B A||`, the norm over the inputs of each output. The norm is always that of the
    base with this adapter alone, also where other adapters were added before, as PEFT does when it merges several.

    Source:
        DoRA, arXiv 2402.09353, Eq. 5.
    """

    factors: LoraFactors
    magnitude: Tensor
    """`m`, one per output of the layer (per dimension of an embedding)."""
    by_columns: bool
    """Whether an output is a column of the stored tensor: transposed layers and embeddings."""

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the stored tensor."""
        return self.factors.shape

    def transposed(self) -> Dora:
        """Return the same change for a tensor that is stored the other way round."""
        return Dora(self.factors.transposed(), self.magnitude, not self.by_columns)

    def apply(self, values: Tensor, start: int, stop: int, below: Below) -> Tensor:
        """Return elements `start:stop`; needs the base's own rows, and one pass over all of them where `by_columns`."""
        rows, columns = self.shape
        wide = self.magnitude / below.remember(lambda: self._column_norms(below)) if self.by_columns else None
        for first, last in row_blocks(start, stop, rows, columns):
            delta = self.factors.delta(first, last)
            if wide is None:
                whole = below.base(first * columns, last * columns).view(-1, columns) + delta
                norms = whole.double().square().sum(dim=1).sqrt().float()
                factor = (self.magnitude[first:last] / norms).unsqueeze(1).expand_as(delta)
            else:
                factor = wide.unsqueeze(0).expand_as(delta)
            low, high = max(start, first * columns), min(stop, last * columns)
            inside = slice(low - first * columns, high - first * columns)
            run = values[low - start : high - start]
            run += delta.flatten()[inside]
            run *= factor.reshape(-1)[inside]
        return values

    def settings(self) -> str:
        """Return scale and layout."""
        return f"{self.factors.scale!r} {self.by_columns}"

    def tensors(self) -> tuple[Tensor, ...]:
        """Return both factors and the magnitudes."""
        return (self.factors.left, self.factors.right, self.magnitude)

    def _column_norms(self, below: Below) -> Tensor:
        rows, columns = self.shape
        squares = torch.zeros(columns, dtype=torch.float64)
        for first, last in row_blocks(0, rows * columns, rows, columns):
            whole = below.base(first * columns, last * columns).view(-1, columns) + self.factors.delta(first, last)
            squares += whole.double().square().sum(dim=0)
        return squares.sqrt().float()


@dataclass(frozen=True, slots=True)
class Hadamard:
    """LoHa: the element-wise product of two low-rank sums is added.

    Source:
        FedPara, arXiv 2108.06098; LyCORIS, arXiv 2309.14859.
    """

    first: LoraFactors
    second: LoraFactors
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the stored tensor."""
        return self.first.shape

    def delta(self, start_row: int = 0, stop_row: int | None = None) -> Tensor:
        """Return rows `start_row:stop_row` of what is added, in float32."""
        return self.first.delta(start_row, stop_row) * self.second.delta(start_row, stop_row) * self.scale

    def apply(self, values: Tensor, start: int, stop: int, below: Below) -> Tensor:
        """Return elements `start:stop` with the product added, in place."""
        return _add(values, start, stop, *self.shape, self.delta)

    def settings(self) -> str:
        """Return the scale."""
        return repr(self.scale)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all four factors."""
        return (*self.first.tensors(), *self.second.tensors())


@dataclass(frozen=True, slots=True)
class Kronecker:
    """LoKr: the Kronecker product of two small matrices is added.

    Source:
        KronA, arXiv 2212.10650; LyCORIS, arXiv 2309.14859.
    """

    first: Tensor
    """Shape `[a, c]`."""
    second: Tensor
    """Shape `[b, d]`; the tensor is `[a b, c d]`."""
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the stored tensor."""
        return (self.first.shape[0] * self.second.shape[0], self.first.shape[1] * self.second.shape[1])

    def delta(self, start_row: int = 0, stop_row: int | None = None) -> Tensor:
        """Return rows `start_row:stop_row` of what is added, in float32."""
        rows = torch.arange(start_row, self.shape[0] if stop_row is None else stop_row)
        height = self.second.shape[0]
        pairs = self.first[rows // height].unsqueeze(2) * self.second[rows % height].unsqueeze(1)
        return pairs.flatten(1) * self.scale

    def apply(self, values: Tensor, start: int, stop: int, below: Below) -> Tensor:
        """Return elements `start:stop` with the product added, in place."""
        return _add(values, start, stop, *self.shape, self.delta)

    def settings(self) -> str:
        """Return the scale."""
        return repr(self.scale)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return both matrices."""
        return (self.first, self.second)


@dataclass(frozen=True, slots=True)
class ExpertFactors:
    """One low-rank sum for each expert of a tensor `[experts, rows, columns]`."""

    left: Tensor
    """Shape `[experts, rows, rank]`."""
    right: Tensor
    """Shape `[experts, rank, columns]`."""
    scale: float

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the stored tensor."""
        return (self.left.shape[0], self.left.shape[1], self.right.shape[2])

    def delta(self, start_row: int = 0, stop_row: int | None = None) -> Tensor:
        """Return rows `start_row:stop_row`, counted through all experts, of what is added, in float32."""
        experts, rows, columns = self.shape
        stop = experts * rows if stop_row is None else stop_row
        parts = []
        for expert in range(start_row // rows, -(-stop // rows)):
            low, high = max(start_row - expert * rows, 0), min(stop - expert * rows, rows)
            parts.append(self.scale * (self.left[expert, low:high] @ self.right[expert]))
        return torch.cat(parts) if parts else torch.empty(0, columns)

    def apply(self, values: Tensor, start: int, stop: int, below: Below) -> Tensor:
        """Return elements `start:stop` with the sums added, in place."""
        experts, rows, columns = self.shape
        return _add(values, start, stop, experts * rows, columns, self.delta)

    def settings(self) -> str:
        """Return the scale."""
        return repr(self.scale)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return both stacks of factors."""
        return (self.left, self.right)


@dataclass(frozen=True, slots=True)
class Scaling:
    """IA3: rows or columns are multiplied by learned numbers.

    Source:
        IA3, arXiv 2205.05638.
    """

    vector: Tensor
    shape: tuple[int, ...]
    by_columns: bool

    def apply(self, values: Tensor, start: int, stop: int, below: Below) -> Tensor:
        """Return elements `start:stop` multiplied, in place."""
        columns = self.shape[1] if len(self.shape) > 1 else 1
        places = torch.arange(start, stop)
        values *= self.vector[places % columns if self.by_columns else places // columns]
        return values

    def settings(self) -> str:
        """Return shape and layout."""
        return f"{self.shape} {self.by_columns}"

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the multipliers."""
        return (self.vector,)


@dataclass(frozen=True, slots=True)
class Offset:
    """A vector is added: the bias of LoRA's `B`."""

    vector: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the stored tensor."""
        return tuple(self.vector.shape)

    def apply(self, values: Tensor, start: int, stop: int, below: Below) -> Tensor:
        """Return elements `start:stop` with the scaled vector added, in place."""
        values += self.scale * self.vector[start:stop]
        return values

    def settings(self) -> str:
        """Return the scale."""
        return repr(self.scale)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the vector."""
        return (self.vector,)


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Some rows of an embedding are replaced."""

    indices: tuple[int, ...]
    rows: Tensor
    """Shape `[len(indices), columns]`."""
    height: int
    """Rows of the whole embedding."""

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the stored tensor."""
        return (self.height, self.rows.shape[1])

    def apply(self, values: Tensor, start: int, stop: int, below: Below) -> Tensor:
        """Return elements `start:stop` with the rows put in, in place."""
        columns = self.rows.shape[1]
        for index, row in zip(self.indices, self.rows, strict=True):
            first = index * columns
            low, high = max(start, first), min(stop, first + columns)
            if low < high:
                values[low - start : high - start] = row[low - first : high - first]
        return values

    def settings(self) -> str:
        """Return which rows are replaced."""
        return str(self.indices)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the new rows."""
        return (self.rows,)


@dataclass(frozen=True, slots=True)
class Rotation:
    """OFT: the inputs of a linear layer are rotated in blocks, `W' = W blockdiag(R)^T`.

    Source:
        OFT, arXiv 2306.07280; the Cayley-Neumann series, arXiv 2506.19847.
    """

    blocks: Tensor
    """Shape `[blocks, size, size]`."""
    height: int
    """Rows of the stored tensor."""

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the stored tensor."""
        return (self.height, self.blocks.shape[0] * self.blocks.shape[1])

    def apply(self, values: Tensor, start: int, stop: int, below: Below) -> Tensor:
        """Return elements `start:stop` rotated; whole rows are read again."""
        rows, columns = self.shape
        count, size, _ = self.blocks.shape
        for first, last in row_blocks(start, stop, rows, columns):
            whole = below.before(first * columns, last * columns).view(-1, count, size)
            turned = torch.einsum("rnk,nck->rnc", whole, self.blocks).flatten()
            low, high = max(start, first * columns), min(stop, last * columns)
            values[low - start : high - start] = turned[low - first * columns : high - first * columns]
        return values

    def settings(self) -> str:
        """Return the height."""
        return str(self.height)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the rotations."""
        return (self.blocks,)


def row_blocks(start: int, stop: int, rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Yield `(first, last)` rows of the fixed blocks that elements `start:stop` of a matrix fall into."""
    if not columns or start >= stop:
        return
    height = max(1, BLOCK_ELEMENTS // columns)
    first = start // columns // height * height
    while first < rows and first * columns < stop:
        yield first, min(rows, first + height)
        first += height


def _add(values: Tensor, start: int, stop: int, rows: int, columns: int, delta: Callable[[int, int], Tensor]) -> Tensor:
    """Add elements `start:stop` of a matrix that is known by its rows to `values`, in place."""
    for first, last in row_blocks(start, stop, rows, columns):
        low, high = max(start, first * columns), min(stop, last * columns)
        block = delta(first, last).flatten()
        values[low - start : high - start] += block[low - first * columns : high - first * columns]
    return values
