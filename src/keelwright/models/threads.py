# SPDX-License-Identifier: Apache-2.0
"""How many threads a model deserves: small ones run slower with several, because every operation waits at a barrier."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

SMALL_MODEL = 50_000_000
"""Parameters below which one thread is used. On the lab's organism several threads were up to ten times slower."""


@contextlib.contextmanager
def threads_for(parameters: int) -> Iterator[None]:
    """Use one torch thread inside the block when the model is small; leave the setting alone otherwise."""
    before = torch.get_num_threads()
    if parameters < SMALL_MODEL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
