# SPDX-License-Identifier: Apache-2.0
"""Threads: one for small models, and the setting put back."""

from __future__ import annotations

import pytest
import torch

from keelwright.models.threads import SMALL_MODEL, threads_for


@pytest.mark.parametrize(("parameters", "inside"), [(SMALL_MODEL - 1, 1), (SMALL_MODEL, 3)])
def test_small_models_get_one_thread_and_the_setting_comes_back(parameters: int, inside: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(RuntimeError), threads_for(parameters):
            assert torch.get_num_threads() == inside
            raise RuntimeError
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
