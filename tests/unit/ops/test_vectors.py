# SPDX-License-Identifier: Apache-2.0
"""Sums by row and column over runs of a flattened matrix, and values spread back over them."""

import pytest
import torch

from keelwright.ops.vectors import at_columns, at_rows, column_sums, row_sums


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 7), (7, 1), (4, 5), (3, 2)])
@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 9, 100])
def test_runs_of_any_length_add_up_to_the_sums_of_the_matrix(rows, columns, chunk):
    matrix = torch.arange(1.0, rows * columns + 1).view(rows, columns)
    by_column, by_row = torch.zeros(columns), torch.zeros(rows)
    for first in range(0, matrix.numel(), chunk):
        part = matrix.flatten()[first : first + chunk]
        by_column += column_sums(part, columns, first)
        by_row += row_sums(part, columns, rows, first)
    # Sums of small whole numbers are exact in any order.
    assert torch.equal(by_column, matrix.sum(0)) and torch.equal(by_row, matrix.sum(1))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 7), (7, 1), (4, 5), (3, 2)])
@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 9, 100])
def test_every_element_of_a_run_finds_the_value_of_its_row_and_column(rows, columns, chunk):
    per_column, per_row = torch.arange(columns), torch.arange(rows)
    size = rows * columns
    for first in range(0, size, chunk):
        index = torch.arange(first, min(size, first + chunk))
        assert torch.equal(at_columns(per_column, len(index), first), index % columns)
        assert torch.equal(at_rows(per_row, columns, len(index), first), index // columns)
