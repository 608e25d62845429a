# SPDX-License-Identifier: Apache-2.0
"""Named random streams: every use of randomness derives its own seed from one base seed.

Adding or removing one use never changes the numbers of another, and no code reads a global seed.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(base: int, *names: str | int) -> int:
    """Return the 63-bit seed of the stream `names` under the base seed.

    Args:
        base: The run's seed.
        names: What the stream is for, from general to particular: `("training", "order", 3)`.

    Returns:
        An integer in [0, 2**63); equal inputs give equal seeds on every machine.
    """
    text = "\x1f".join([str(base), *(str(name) for name in names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(base: int, *names: str | int) -> torch.Generator:
    """Return a CPU `torch.Generator` seeded with `derive_seed(base, *names)`."""
    import torch

    return torch.Generator().manual_seed(derive_seed(base, *names))
