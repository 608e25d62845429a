# SPDX-License-Identifier: Apache-2.0
"""How far apart a layer keeps harmful and harmless prompts, and whether two changes of the weights agree.

For harmful prompts `H`, harmless ones `B` and the last-token states `h` of a layer `l`:

    S_l = 1 - cos(mean h_H, mean h_B)
    D_l = S_l(changed) - S_l(original)

and for two changes of the same weights, such as a vision-language adaptation and a safety tuning,
`cos(dW_vl, dW_safe)`. Values near 0 or below say that the two objectives pull in different directions.

Source: definitions of this project, after the layer comparison in Lee et al., "How Does Vision-Language Adaptation
Impact the Safety of Vision Language Models?", arXiv 2410.07571, whose own indices and values could not be verified.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from keelwright.core.errors import DataError, NumericalError


def separability(
    harmful: Float[Tensor, "layers harmful_prompts d_model"], benign: Float[Tensor, "layers benign_prompts d_model"]
) -> Float[Tensor, " layers"]:
    """Return `S_l` of each layer: 0 where the two mean states point the same way, 2 where they are opposite.

    Args:
        harmful: Last-token states on harmful prompts.
        benign: Last-token states on harmless prompts; their number may differ.

    Returns:
        One value per layer, from 0 to 2, in float64.

    Raises:
        DataError: One of the sets of prompts is empty.
        NumericalError: A mean state is zero or not finite, so that it has no direction.
    """
    if harmful.shape[1] == 0 or benign.shape[1] == 0:
        raise DataError(
            "Separability needs prompts of both kinds.",
            expected="at least one harmful and one harmless prompt",
            found=f"{harmful.shape[1]} and {benign.shape[1]}",
            fix="give both sets of prompts",
        )
    return 1.0 - _cosine(harmful.double().mean(dim=1), benign.double().mean(dim=1), "mean state")


def separability_drift(
    changed: Float[Tensor, " layers"], original: Float[Tensor, " layers"]
) -> Float[Tensor, " layers"]:
    """Return `D_l`, the change of separability: below 0 where a layer tells harmful from harmless prompts less well."""
    return changed.double() - original.double()


def update_cosine(first: Float[Tensor, "*shape"], second: Float[Tensor, "*shape"]) -> float:
    """Return the cosine of two changes of one tensor, from -1 (opposed) to 1 (the same direction).

    Args:
        first: For example `W_vl - W_ref`.
        second: For example `W_safe - W_ref`.

    Returns:
        The cosine, summed in float64.

    Raises:
        NumericalError: A change is zero or not finite, so that it has no direction.
    """
    flat = _cosine(first.double().reshape(1, -1), second.double().reshape(1, -1), "change")
    return float(flat[0])


def relative_update(original: Float[Tensor, "*shape"], changed: Float[Tensor, "*shape"]) -> float:
    """Return `|changed - original| / |original|` in Frobenius norms, summed in float64; 0 where nothing changed.

    Raises:
        NumericalError: The original is zero and the change is not.
    """
    size = float(torch.linalg.vector_norm(original.double()))
    change = float(torch.linalg.vector_norm(changed.double() - original.double()))
    if change == 0.0:
        return 0.0
    if size == 0.0:
        raise NumericalError(
            "A relative change of zero weights is not defined.",
            expected="weights with a norm above 0",
            found=f"norm 0, changed by {change:g}",
            fix="leave the tensor out",
        )
    return change / size


def _cosine(
    first: Float[Tensor, "rows columns"], second: Float[Tensor, "rows columns"], what: str
) -> Float[Tensor, " rows"]:
    sizes = torch.stack([torch.linalg.vector_norm(one, dim=1) for one in (first, second)])
    if not bool((torch.isfinite(sizes) & (sizes > 0)).all()):
        raise NumericalError(
            f"A {what} has no direction.",
            expected="finite values, not all of them zero",
            found=f"norm {float(sizes[~(torch.isfinite(sizes) & (sizes > 0))][0]):g}",
            fix="check the states or weights that were given",
        )
    cosine = (first * second).sum(dim=1) / (sizes[0] * sizes[1])
    return cosine.clamp(-1.0, 1.0)
