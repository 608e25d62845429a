# SPDX-License-Identifier: Apache-2.0
import torch

from keelwright.core.seeds import derive_seed, generator


def test_stream_is_a_known_number():
    assert derive_seed(0, "training", "order", 3) == derive_seed(0, "training", "order", 3)
    assert 0 <= derive_seed(0, "a") < 2**63


def test_streams_differ_by_base_name_and_nesting():
    seeds = {derive_seed(0, "a"), derive_seed(1, "a"), derive_seed(0, "b"), derive_seed(0, "a", "b"), derive_seed(0)}
    assert len(seeds) == 5
    assert derive_seed(0, "ab", "c") != derive_seed(0, "a", "bc")


def test_generator_leaves_the_global_stream_alone():
    before = torch.get_rng_state()
    first = torch.rand(3, generator=generator(0, "x"))
    assert torch.equal(first, torch.rand(3, generator=generator(0, "x")))
    assert torch.equal(before, torch.get_rng_state())
