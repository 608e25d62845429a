# SPDX-License-Identifier: Apache-2.0
"""Any edit under a mask."""

import pytest
import torch

from keelwright.core.protocols import Reach
from keelwright.repair.linear import Linear, LinearConfig
from keelwright.repair.lox import Lox, LoxConfig
from keelwright.repair.safe_lora import SafeLora, SafeLoraConfig
from keelwright.repair.somf import Somf, SomfConfig
from keelwright.weights.masked import Masked
from keelwright.weights.masks import Mask
from keelwright.weights.stream import evaluate
from keelwright.weights.survey import with_survey

SHAPE = (5, 4)


def mask_of(*values):
    return Mask({"w": torch.tensor(values or [1.0, -1.0] * 10)}, {"w": SHAPE})


@pytest.fixture
def sources(memory):
    random = torch.Generator().manual_seed(0)
    return {
        role: memory({name: torch.randn(SHAPE, generator=random) for name in ("w", "v")})
        for role in ("base", "aligned", "tuned")
    }


def run(edit, sources, name="w", chunk=1 << 18):
    used = {role: sources[role] for role in edit.roles()}
    entries = used["tuned"].entries()
    edit = with_survey(edit, used, entries.values())
    return torch.cat([values for _, values in evaluate(edit, used, entries[name], chunk_elements=chunk)]).view(SHAPE)


@pytest.mark.parametrize("export", ["mode", "sample", "mean"])
def test_a_masked_copy_of_the_tuned_model_is_somf_at_full_strength(sources, export):
    masked = Masked(Linear(LinearConfig(1.0)), mask_of(), export)
    somf = Somf(SomfConfig(export=export), mask=mask_of())
    assert masked.reach("w") is Reach.POINTWISE and masked.reach("v") is Reach.COPY
    assert torch.allclose(run(masked, sources), run(somf, sources), atol=1e-6)
    assert torch.equal(run(masked, sources, "v"), sources["tuned"].tensors["v"])


def test_without_rescaling_entries_are_either_edited_or_aligned(sources):
    inner = Linear(LinearConfig(0.3))
    found, edited = run(Masked(inner, mask_of(), rescale=False), sources), run(inner, sources)
    kept = mask_of().values("w", 0, 20).view(SHAPE) > 0
    assert torch.allclose(found, torch.where(kept, edited, sources["aligned"].tensors["w"]), atol=1e-6)


def test_an_empty_mask_leaves_the_aligned_model(sources):
    empty = mask_of(*[-1.0] * 20)
    assert torch.equal(run(Masked(Linear(LinearConfig(0.3)), empty), sources), sources["aligned"].tensors["w"])


@pytest.mark.parametrize(
    "inner", [Lox(LoxConfig(0.5, rank=1)), SafeLora(SafeLoraConfig(selection="number", number=1)), Linear()]
)
def test_every_reach_can_be_masked_and_chunks_do_not_matter(sources, inner):
    masked = Masked(inner, mask_of(), rescale=False)
    plain = run(inner, sources)
    kept = mask_of().values("w", 0, 20).view(SHAPE) > 0
    expected = torch.where(kept, plain, sources["aligned"].tensors["w"])
    assert torch.allclose(run(masked, sources), expected, atol=1e-6)
    assert torch.equal(run(masked, sources, chunk=3), run(masked, sources))
