# SPDX-License-Identifier: Apache-2.0
"""Second-order statistics of a linear layer's inputs, and edits that make good for what they change.

A change `E` of the weights costs `tr(E H E^T) / 2` on the inputs, with `H = (2 / n) X X^T`. When one entry of a row is
given a value, the others of that row can be moved so that this cost is least.

Source:
    Hassibi, Stork: Optimal brain surgeon, NeurIPS 1992; Frantar, Alistarh: SparseGPT, arXiv 2301.00774, section 3.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def inverse_factor(
    hessian: Float[Tensor, "columns columns"], *, damping: float = 0.01
) -> Float[Tensor, "columns columns"]:
    """Return the upper Cholesky factor U of the damped inverse: `U^T U = (H + d I)^-1`, in float64.

    Args:
        hessian: Symmetric, positive semi-definite. Inputs that are always zero count as 1.
        damping: d as a share of the mean of H's diagonal, 0 or more.

    Raises:
        torch.linalg.LinAlgError: The damped matrix is not positive definite.
    """
    wide = hessian.double()
    # A product in float32 is symmetric only up to rounding, and decompositions read one half.
    wide = (wide + wide.T) / 2.0
    diagonal = wide.diagonal()
    diagonal[diagonal == 0.0] = 1.0
    diagonal += damping * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(wide))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def place_entries(
    weights: Float[Tensor, "rows columns"],
    wanted: Float[Tensor, "rows columns"],
    chosen: Bool[Tensor, "rows columns"],
    factor: Float[Tensor, "columns columns"],
    *,
    group: int = 1,
) -> tuple[Float[Tensor, "rows columns"], Float[Tensor, "rows columns"]]:
    """Return the weights with the chosen entries as wanted and the others compensated, and the scaled errors.

    Columns are fixed from left to right. What a column's fixing costs is made good in the columns to its right.

    Args:
        weights: Before; every entry that is not chosen starts from here.
        wanted: Values of the chosen entries.
        chosen: Which entries take the wanted value.
        factor: What `inverse_factor` returned, for these columns.
        group: Columns fixed at once; within a group there is no compensation, and each is charged its own diagonal
            entry, as in the code of SafeDelta. 1 is the exact recursion.
    """
    left, done, errors = weights.clone(), torch.empty_like(weights), torch.zeros_like(weights)
    columns = weights.shape[1]
    for start in range(0, columns, group):
        stop = min(start + group, columns)
        own = left[:, start:stop]
        fixed = torch.where(chosen[:, start:stop], wanted[:, start:stop], own)
        error = (own - fixed) / factor.diagonal()[start:stop]
        left[:, stop:] -= error @ factor[start:stop, stop:]
        done[:, start:stop], errors[:, start:stop] = fixed, error
    return done, errors
