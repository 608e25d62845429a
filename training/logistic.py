# SPDX-License-Identifier: Apache-2.0
"""Multinomial logistic regression by L-BFGS: deterministic, for sparse and dense tables."""

from __future__ import annotations

import numpy as np
from scipy import optimize, sparse

from keelwright.judges.linear_text import Floats, GramTable
from keelwright.judges.refusal_classifier import softmax


def as_matrix(table: GramTable, columns: int) -> sparse.csr_array:
    """Return hashed n-grams as a sparse matrix."""
    return sparse.csr_array((table.values, (table.rows, table.columns)), shape=(table.texts, columns))


def fit(
    table: sparse.csr_array | Floats, targets: Floats, *, penalty: float, weights: Floats | None = None
) -> tuple[Floats, Floats]:
    """Return the coefficients `[classes, columns]` and biases `[classes]` that minimise the mean cross-entropy.

    Args:
        table: Shape `[rows, columns]`.
        targets: Probabilities of the classes, shape `[rows, classes]`.
        penalty: Half of it times the squared coefficients is added to the mean loss; biases are free.
        weights: One per row; all the same by default.
    """
    n_rows, n_columns = table.shape
    n_classes = targets.shape[1]
    share = np.full(n_rows, 1.0 / n_rows) if weights is None else weights / weights.sum()
    transposed = table.T.tocsr() if sparse.issparse(table) else table.T

    def loss(flat: Floats) -> tuple[float, Floats]:
        coefficients = flat[: n_classes * n_columns].reshape(n_classes, n_columns)
        found = softmax(table @ coefficients.T + flat[n_classes * n_columns :])
        value = -(share[:, None] * targets * np.log(found + 1e-300)).sum() + penalty / 2 * (coefficients**2).sum()
        error = share[:, None] * (found - targets)
        slope = (transposed @ error).T + penalty * coefficients
        return value, np.concatenate([slope.ravel(), error.sum(axis=0)])

    start = np.zeros(n_classes * (n_columns + 1))
    found = optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 300, "maxcor": 10})
    return found.x[: n_classes * n_columns].reshape(n_classes, n_columns), found.x[n_classes * n_columns :]


def temperature(logits: Floats, classes: np.ndarray) -> float:
    """Return the factor on the logits that minimises the cross-entropy of the true classes."""

    def loss(log_factor: float) -> float:
        found = softmax(np.exp(log_factor) * logits)
        return float(-np.log(found[np.arange(len(classes)), classes] + 1e-300).mean())

    return float(np.exp(optimize.minimize_scalar(loss, bounds=(-3.0, 3.0), method="bounded").x))


def calibration_error(said: Floats, truth: np.ndarray, *, bins: int = 10) -> float:
    """Return the expected calibration error of probabilities, in bins of equal width (Guo et al., arXiv 1706.04599)."""
    box = np.minimum((said * bins).astype(int), bins - 1)
    gaps = [abs(said[box == one].mean() - truth[box == one].mean()) * (box == one).mean() for one in set(box.tolist())]
    return float(sum(gaps))
