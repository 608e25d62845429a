# SPDX-License-Identifier: Apache-2.0
"""Sums over the rows or the columns of a matrix that arrives as runs of its flattened elements."""

from __future__ import annotations

from jaxtyping import Float, Shaped
from torch import Tensor


def column_sums(values: Float[Tensor, " run"], columns: int, offset: int) -> Float[Tensor, " columns"]:
    """Return, for each column of a matrix, the sum of those elements that lie in the run.

    >>> import torch
    >>> column_sums(torch.tensor([1.0, 2.0, 3.0, 4.0]), columns=3, offset=2).tolist()
    [2.0, 3.0, 5.0]

    Args:
        values: Elements `offset:` of the flattened matrix.
        columns: Of the matrix.
        offset: Index of the first element.
    """
    out = values.new_zeros(columns)
    head = min(-offset % columns, values.numel())
    start = offset % columns
    out[start : start + head] += values[:head]
    rows = (values.numel() - head) // columns
    body = head + rows * columns
    if rows:
        out += values[head:body].view(rows, columns).sum(0)
    out[: values.numel() - body] += values[body:]
    return out


def at_columns(per_column: Shaped[Tensor, " columns"], size: int, offset: int) -> Shaped[Tensor, " run"]:
    """Return, for each element of a run, the value that belongs to its column.

    >>> import torch
    >>> at_columns(torch.tensor([7, 8, 9]), size=4, offset=2).tolist()
    [9, 7, 8, 9]

    Args:
        per_column: One value per column.
        size: Elements of the run.
        offset: Index of its first element in the flattened matrix.
    """
    columns = per_column.numel()
    turned = per_column.roll(-(offset % columns))
    return turned.repeat(-(-size // columns))[:size]


def row_sums(values: Float[Tensor, " run"], columns: int, rows: int, offset: int) -> Float[Tensor, " rows"]:
    """Return, for each row of a matrix, the sum of those elements that lie in the run.

    >>> import torch
    >>> row_sums(torch.tensor([1.0, 2.0, 3.0, 4.0]), columns=3, rows=3, offset=2).tolist()
    [1.0, 9.0, 0.0]

    Args:
        values: Elements `offset:` of the flattened matrix.
        columns: Of the matrix.
        rows: Of the matrix.
        offset: Index of the first element.
    """
    out = values.new_zeros(rows)
    head = min(-offset % columns, values.numel())
    first, body = offset // columns, head + (values.numel() - head) // columns * columns
    if head:
        out[first] += values[:head].sum()
        first += 1
    full = (body - head) // columns
    if full:
        out[first : first + full] += values[head:body].view(full, columns).sum(1)
    if body < values.numel():
        out[first + full] += values[body:].sum()
    return out


def at_rows(per_row: Shaped[Tensor, " rows"], columns: int, size: int, offset: int) -> Shaped[Tensor, " run"]:
    """Return, for each element of a run, the value that belongs to its row.

    >>> import torch
    >>> at_rows(torch.tensor([7, 8, 9]), columns=3, size=4, offset=2).tolist()
    [7, 8, 8, 8]

    Args:
        per_row: One value per row.
        columns: Of the matrix.
        size: Elements of the run.
        offset: Index of its first element in the flattened matrix.
    """
    first, last = offset // columns, -(-(offset + size) // columns)
    skipped = offset - first * columns
    return per_row[first:last].repeat_interleave(columns)[skipped : skipped + size]
