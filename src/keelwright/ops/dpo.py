# SPDX-License-Identifier: Apache-2.0
"""Direct preference optimisation: the loss, and the log-probabilities it is made of.

Source:
    Rafailov et al.: Direct Preference Optimization, arXiv 2305.18290, Eq. 7.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

_IGNORED = -100


def answer_logprobs(
    logits: Float[Tensor, "batch tokens vocab"], labels: Int[Tensor, "batch tokens"]
) -> tuple[Float[Tensor, " batch"], Int[Tensor, " batch"]]:
    """Return the summed log-probability of each row's answer, in nats, and how many tokens it has.

    Args:
        logits: Of the model, in any dtype; evaluated in float32 (float64 stays).
        labels: Token ids where there is an answer, -100 elsewhere; not shifted.
    """
    wide = logits if logits.dtype is torch.float64 else logits.float()
    targets = labels[:, 1:]
    losses = functional.cross_entropy(wide[:, :-1].transpose(1, 2), targets, reduction="none", ignore_index=_IGNORED)
    return -losses.sum(dim=1), (targets != _IGNORED).sum(dim=1)


def dpo_loss(
    chosen: Float[Tensor, " batch"],
    rejected: Float[Tensor, " batch"],
    reference_chosen: Float[Tensor, " batch"],
    reference_rejected: Float[Tensor, " batch"],
    *,
    beta: float,
) -> Float[Tensor, " batch"]:
    """Return `-log sigmoid(beta (log-ratio of chosen - log-ratio of rejected))`, in nats, for each pair.

    Args:
        chosen, rejected: Log-probabilities of both answers under the policy, in nats per answer.
        reference_chosen, reference_rejected: The same under the frozen reference.
        beta: Strength of the pull towards the reference, above 0.
    """
    margin = (chosen - reference_chosen) - (rejected - reference_rejected)
    return -functional.logsigmoid(beta * margin)
