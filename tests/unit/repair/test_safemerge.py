# SPDX-License-Identifier: Apache-2.0
"""SafeMERGE: which layers are merged, and with what."""

import pytest
import torch

from keelwright.core.errors import ConfigError
from keelwright.core.protocols import Reach, TensorEntry
from keelwright.models.dtypes import STORED_NAMES
from keelwright.repair.safe_lora import projected_drift
from keelwright.repair.safemerge import Safemerge, SafemergeConfig, safemerge
from keelwright.weights.stream import evaluate
from keelwright.weights.survey import with_survey


class Memory:
    """Tensors in memory as a source."""

    def __init__(self, tensors):
        self.tensors = tensors

    def entries(self):
        return {
            name: TensorEntry(name, STORED_NAMES[one.dtype], tuple(one.shape)) for name, one in self.tensors.items()
        }

    def read(self, name, start, stop):
        return self.tensors[name].reshape(-1)[start:stop].clone()

    def describe(self):
        return "memory"


def run(edit, chunk_elements=1 << 18, **models):
    """Return every tensor that the engine makes."""
    sources = {role: Memory(tensors) for role, tensors in models.items()}
    entries = sources[edit.roles()[-1]].entries()
    edit = with_survey(edit, sources, entries.values())
    return {
        name: torch.cat([values for _, values in evaluate(edit, sources, entry, chunk_elements=chunk_elements)]).view(
            entry.shape
        )
        for name, entry in entries.items()
    }


def models(roles, shape=(6, 4), seed=0):
    random = torch.Generator().manual_seed(seed)
    names = ("layer.weight", "other.weight")
    return {
        role: {**{name: torch.randn(shape, generator=random) for name in names}, "norm": torch.ones(4)}
        for role in roles
    }


ROLES = ("base", "aligned", "tuned")
BASE = torch.zeros(2, 2)
ALIGNED = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
TUNED = torch.tensor([[5.0, 4.0], [0.0, 12.0]])
SAFE = torch.tensor([[1.0, 0.0], [0.0, 2.0]])


def test_known_answer_of_a_layer_below_the_threshold():
    # The cosine is 5 / 13.
    found = safemerge(BASE, ALIGNED, SAFE, TUNED, coefficient=0.5, threshold=0.4)
    assert found.tolist() == [[3.0, 2.0], [0.0, 7.0]]
    assert safemerge(BASE, ALIGNED, SAFE, TUNED, coefficient=0.5, threshold=0.38) is TUNED


def test_the_released_weights_are_the_defaults():
    assert SafemergeConfig() == SafemergeConfig(coefficient=0.8, threshold=0.35)


def test_only_layers_below_the_threshold_are_merged():
    given = models(ROLES)
    similar = {
        name: projected_drift(*(given[role][name] for role in ROLES))[1] for name in ("layer.weight", "other.weight")
    }
    low, high = sorted(similar, key=similar.get)
    between = (similar[low] + similar[high]) / 2
    found = run(Safemerge(SafemergeConfig(coefficient=0.25, threshold=between)), **given)
    expected = 0.75 * given["aligned"][low] + 0.25 * given["tuned"][low]
    assert torch.allclose(found[low], expected, atol=1e-6)
    assert torch.equal(found[high], given["tuned"][high]) and torch.equal(found["norm"], given["tuned"]["norm"])


def test_a_reference_takes_the_place_of_the_aligned_model_in_the_merge_alone():
    given = models(("base", "aligned", "reference", "tuned"))
    edit = Safemerge(SafemergeConfig(coefficient=0.0, threshold=1.0), referenced=True)
    found = run(edit, **given)
    assert edit.roles() == ("base", "aligned", "reference", "tuned")
    assert torch.equal(found["layer.weight"], given["reference"]["layer.weight"])


def test_the_full_weight_of_the_tuned_model_is_a_copy():
    assert Safemerge(SafemergeConfig(coefficient=1.0)).reach("layer.weight") is Reach.COPY
    assert Safemerge().reach("model.embed_tokens.weight") is Reach.COPY


def test_wrong_settings_are_errors():
    with pytest.raises(ConfigError, match="'coefficient' is out of range"):
        SafemergeConfig(coefficient=1.2)
