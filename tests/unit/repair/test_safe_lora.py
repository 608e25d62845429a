# SPDX-License-Identifier: Apache-2.0
"""Safe LoRA: the tests of its sheet, on factors, on matrices and through the engine."""

import pytest
import torch

from keelwright.core.errors import ConfigError, ModelMismatchError
from keelwright.core.protocols import Reach, TensorEntry
from keelwright.models.adapters import AdaptedCheckpoint, LoraFactors
from keelwright.models.dtypes import STORED_NAMES
from keelwright.repair.safe_lora import (
    SafeLora,
    SafeLoraConfig,
    factored_cosine,
    project_adapter,
    projected_drift,
    safe_lora,
)
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


def test_known_answer_of_a_two_by_two_matrix():
    # V = diag(2, 0), ||V|| = 2, C = diag(2, 0); D = [[3, 4], [0, 12]], C D = [[6, 8], [0, 0]].
    inside, similarity = projected_drift(BASE, ALIGNED, TUNED)
    assert inside.tolist() == [[6.0, 8.0], [0.0, 0.0]]
    assert similarity == pytest.approx(50 / (10 * 13))
    assert safe_lora(BASE, ALIGNED, TUNED, threshold=0.5).tolist() == [[8.0, 8.0], [0.0, 0.0]]
    assert safe_lora(BASE, ALIGNED, TUNED, threshold=0.3) is TUNED


def test_known_answer_of_the_true_projector():
    found = safe_lora(BASE, ALIGNED, TUNED, threshold=0.5, projector="exact_topk")
    assert torch.allclose(found, torch.tensor([[5.0, 4.0], [0.0, 0.0]]), atol=1e-6)


def test_the_true_projector_leaves_drift_in_its_subspace_and_is_idempotent():
    given = models(ROLES)
    base, aligned, tuned = (given[role]["layer.weight"] for role in ROLES)
    once, _ = projected_drift(base, aligned, tuned, projector="exact_topk", energy=0.6)
    twice, similarity = projected_drift(base, aligned, aligned + once, projector="exact_topk", energy=0.6)
    assert torch.allclose(once, twice, atol=1e-5) and similarity == pytest.approx(1.0)
    stand_in, _ = projected_drift(base, aligned, tuned)
    assert not torch.allclose(stand_in, projected_drift(base, aligned, aligned + stand_in)[0], atol=0.1)


def test_a_threshold_below_all_cosines_changes_nothing_and_one_projects_all():
    given = models(ROLES)
    similar = [projected_drift(*(given[role][name] for role in ROLES))[1] for name in ("layer.weight", "other.weight")]
    below = run(SafeLora(SafeLoraConfig(threshold=min(similar) - 0.01)), **given)
    assert all(torch.equal(below[name], given["tuned"][name]) for name in below)
    every = run(SafeLora(SafeLoraConfig(threshold=1.0)), **given)
    for name in ("layer.weight", "other.weight"):
        inside, _ = projected_drift(*(given[role][name] for role in ROLES))
        assert torch.allclose(every[name], given["aligned"][name] + inside, atol=1e-6)
    assert torch.equal(every["norm"], given["tuned"]["norm"])
    assert SafeLora(SafeLoraConfig(threshold=-1.0)).reach("layer.weight") is Reach.COPY


def test_factors_and_dense_matrices_give_the_same():
    given = models(ROLES[:2])
    random = torch.Generator().manual_seed(5)
    factors = {
        name: LoraFactors(torch.randn(6, 2, generator=random), torch.randn(2, 4, generator=random), 0.5)
        for name in ("layer.weight", "other.weight")
    }
    base, aligned = Memory(given["base"]), Memory(given["aligned"])
    tuned = {name: given["aligned"][name] + factors[name].delta() for name in factors}
    for projector in ("safe_lora", "exact_topk"):
        config = SafeLoraConfig(threshold=1.0, projector=projector)
        projected, similarity = project_adapter(factors, base, aligned, config)
        source = AdaptedCheckpoint(aligned, factors=projected)
        for name, one in factors.items():
            dense = safe_lora(
                given["base"][name], given["aligned"][name], tuned[name], threshold=1.0, projector=projector
            )
            assert torch.allclose(source.read(name, 0, 24).view(6, 4), dense, atol=1e-5)
            _, expected = projected_drift(given["base"][name], given["aligned"][name], tuned[name], projector=projector)
            assert similarity[name] == pytest.approx(expected, abs=1e-5)
            assert projected[name].right is one.right and projected[name].scale == 0.5


def test_factored_cosine_of_an_empty_adapter_is_one():
    zero, some = torch.zeros(3, 2), torch.ones(2, 4)
    assert factored_cosine(zero, zero, some) == 1.0
    assert factored_cosine(zero, torch.ones(3, 2), some) == 0.0


def test_a_number_takes_the_lowest_cosines_and_projects_each_once():
    given = models(ROLES)
    similar = {
        name: projected_drift(*(given[role][name] for role in ROLES))[1] for name in given["tuned"] if "w" in name
    }
    lowest = min(similar, key=similar.get)
    found = run(SafeLora(SafeLoraConfig(selection="number", number=1, threshold=-1.0)), **given)
    for name in similar:
        inside, _ = projected_drift(*(given[role][name] for role in ROLES))
        expected = given["aligned"][name] + inside if name == lowest else given["tuned"][name]
        assert torch.allclose(found[name], expected, atol=1e-6)
    assert torch.equal(found[max(similar, key=similar.get)], given["tuned"][max(similar, key=similar.get)])


def test_matrices_without_drift_do_not_use_up_the_number():
    given = models(ROLES)
    given["tuned"]["layer.weight"] = given["aligned"]["layer.weight"].clone()
    found = run(SafeLora(SafeLoraConfig(selection="number", number=1)), **given)
    assert not torch.equal(found["other.weight"], given["tuned"]["other.weight"])


def test_the_survey_does_not_depend_on_how_rows_are_dealt_out(monkeypatch):
    from keelwright.weights import stream

    given = models(ROLES)
    edit = SafeLora(SafeLoraConfig(selection="number", number=1))
    whole = run(edit, **given)
    monkeypatch.setattr(stream, "_REDUCTION_ELEMENTS", 8)
    parts = run(edit, **given)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_embeddings_are_left_alone_unless_asked_for():
    edit = SafeLora(SafeLoraConfig())
    assert edit.reach("model.embed_tokens.weight") is Reach.COPY and edit.reach("lm_head.weight") is Reach.COPY
    assert SafeLora(SafeLoraConfig(embeddings=True)).reach("lm_head.weight") is Reach.MATRIX


def test_embeddings_do_not_use_up_the_number():
    given = models(ROLES)
    given = {role: {"lm_head.weight": one["layer.weight"], "w": one["other.weight"]} for role, one in given.items()}
    found = run(SafeLora(SafeLoraConfig(selection="number", number=1)), **given)
    assert torch.equal(found["lm_head.weight"], given["tuned"]["lm_head.weight"])
    assert not torch.equal(found["w"], given["tuned"]["w"])


def test_without_alignment_nothing_of_the_drift_is_safe():
    assert torch.equal(safe_lora(ALIGNED, ALIGNED, TUNED, threshold=0.0), ALIGNED)
    assert safe_lora(BASE, ALIGNED, ALIGNED, threshold=0.5) is ALIGNED


def test_an_adapter_of_another_model_is_refused():
    given = models(ROLES)
    factors = {"layer.weight": LoraFactors(torch.ones(5, 1), torch.ones(1, 4), 1.0)}
    with pytest.raises(ModelMismatchError, match=r"does not fit .memory. at .layer\.weight.") as caught:
        project_adapter(factors, Memory(given["base"]), Memory(given["aligned"]))
    assert caught.value.found == "shape [6, 4]"


def test_wrong_settings_are_errors():
    with pytest.raises(ConfigError, match="'threshold' is out of range"):
        SafeLoraConfig(threshold=1.5)
    with pytest.raises(ConfigError, match="'projector' is not a known choice"):
        SafeLoraConfig(projector="svd")
