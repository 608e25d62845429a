# SPDX-License-Identifier: Apache-2.0
"""What sharding does where nothing is sharded; two processes are in integration/test_distributed_training.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaForCausalLM

from keelwright.core.errors import ConfigError
from keelwright.training.sharding import (
    is_sharded,
    shard,
    spread_as,
    spread_optimizer,
    whole,
    whole_state,
    whole_tree,
)

Model = Callable[..., LlamaForCausalLM]


def test_one_process_has_nothing_to_shard(new_model: Model) -> None:
    model = new_model()
    with pytest.raises(ConfigError, match=r"one process(.|\n)*at least 2 processes(.|\n)*accelerate launch"):
        shard(model)
    assert not is_sharded(model)


def test_whole_tensors_pass_as_they_are(new_model: Model) -> None:
    tensor = torch.arange(4.0, requires_grad=True)
    assert torch.equal(whole(tensor), tensor)
    assert not whole(tensor).requires_grad
    assert spread_as(tensor, torch.zeros(4)) is tensor
    state = new_model().state_dict()
    assert all(torch.equal(one, state[name]) for name, one in whole_state(new_model()).items())


def test_an_optimisers_state_passes_as_it_is_and_is_dropped_where_it_is_not_wanted() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    kept = whole_tree(optimizer.state_dict(), keep=True)
    assert torch.equal(kept["state"][0]["exp_avg"], optimizer.state[weight]["exp_avg"])
    assert kept["param_groups"] == optimizer.state_dict()["param_groups"]
    assert spread_optimizer(kept, [weight])["state"][0].keys() == kept["state"][0].keys()
    assert whole_tree(optimizer.state_dict(), keep=False) == {}
