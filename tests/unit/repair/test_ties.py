# SPDX-License-Identifier: Apache-2.0
"""TIES-Merging: the tests of its sheet."""

from __future__ import annotations

import pytest
import torch

from keelwright.core.errors import ConfigError
from keelwright.core.protocols import Reach, TensorEntry
from keelwright.models.dtypes import STORED_NAMES
from keelwright.ops.task_vectors import trim
from keelwright.repair.ties import Ties, TiesConfig, ties
from keelwright.weights import stream, threshold
from keelwright.weights.edit import model_roles
from keelwright.weights.stream import evaluate
from keelwright.weights.survey import with_survey


class Memory:
    """Named tensors as a source."""

    def __init__(self, tensors):
        self.tensors = tensors

    def entries(self):
        return {n: TensorEntry(n, STORED_NAMES[t.dtype], tuple(t.shape)) for n, t in self.tensors.items()}

    def read(self, name, start, stop):
        return self.tensors[name].reshape(-1)[start:stop].clone()

    def describe(self):
        return "memory"


def run(edit, *tensors, chunk=1 << 18):
    """Return what the engine makes of one tensor; the base comes first, then the tuned models in their order."""
    roles = ("aligned", *model_roles(len(tensors) - 1))
    sources = {role: Memory({"w": tensor}) for role, tensor in zip(roles, tensors, strict=True)}
    entry = sources["tuned"].entries()["w"]
    edit = with_survey(edit, sources, [entry])
    parts = [values for _, values in evaluate(edit, sources, entry, chunk_elements=chunk)]
    return torch.cat(parts).view(entry.shape)


def row(*values):
    return torch.tensor(values, dtype=torch.float32)


ZERO = torch.zeros(4)
FIRST, SECOND = row(3, -1, 0.5, 2), row(-1, 2, -4, 0.1)
SHEET = {"weight": (1.0, 0.5), "density": 0.75}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"normalize": True}, [3.0, 2.0, -4.0, 2.0]), ({"normalize": False}, [3.0, 1.0, -2.0, 2.0])],
)
def test_known_answer_of_the_sheet(settings, expected):
    config = TiesConfig(**SHEET, **settings)
    assert ties(ZERO, [FIRST, SECOND], config).tolist() == expected
    assert run(Ties(config, 2), ZERO, FIRST, SECOND).tolist() == expected


def naive(base, tuned, weights, density, *, normalize):
    """Return the merge in double precision, by sorting."""
    vectors = []
    for one, weight in zip(tuned, weights, strict=True):
        delta = (one - base).flatten().double()
        order = sorted(range(delta.numel()), key=lambda i, d=delta: (-abs(float(d[i])), i))
        kept = torch.zeros_like(delta)
        for index in order[: max(1, int(density * delta.numel()))]:
            kept[index] = delta[index] * weight
        vectors.append(kept)
    sign = torch.where(sum(vectors) >= 0, 1.0, -1.0).double()
    agree = [(vector.sign() == sign) for vector in vectors]
    total = sum(vector * one for vector, one in zip(vectors, agree, strict=True))
    share = sum(weight * one.double() for weight, one in zip(weights, agree, strict=True))
    merged = total / torch.where(share == 0, 1.0, share) if normalize else total
    return (base.flatten().double() + merged).view(base.shape)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("density", [0.05, 0.2, 0.29, 0.9])
def test_random_tensors_agree_with_a_naive_merge(normalize, density):
    random = torch.Generator().manual_seed(7)
    base, *tuned = (torch.randn(13, 31, generator=random) for _ in range(4))
    config = TiesConfig(weight=(0.7, 0.2, 1.3), density=density, normalize=normalize)
    expected = naive(base, tuned, config.weight, density, normalize=normalize)
    for chunk in (1 << 18, 50, 7):
        assert torch.allclose(run(Ties(config, 3), base, *tuned, chunk=chunk).double(), expected, atol=2e-6)
    assert torch.allclose(ties(base, tuned, config).double(), expected, atol=2e-6)


@pytest.mark.parametrize("density", [0.1, 0.2, 0.29, 0.5, 0.99])
def test_exactly_the_whole_part_is_kept_where_all_magnitudes_are_equal(density):
    base = torch.zeros(100)
    tuned = torch.where(torch.arange(100) % 3 == 0, -1.0, 1.0)
    merged = run(Ties(TiesConfig(density=density)), base, tuned, chunk=9)
    kept = int(density * 100)
    assert merged.count_nonzero() == kept
    assert torch.equal(merged[:kept], tuned[:kept]), "of equal magnitudes the lowest index comes first"


def test_equal_magnitudes_across_reduction_blocks_are_kept_from_the_lowest_index(monkeypatch):
    # Small blocks: the part that holds the last kept entry lies in the middle of the tensor.
    monkeypatch.setattr(threshold, "_BLOCK", 64)
    monkeypatch.setattr(stream, "_REDUCTION_ELEMENTS", 64)
    random = torch.Generator().manual_seed(3)
    for elements in (64, 65, 1000, 64 * 64 * 3 + 5):
        zero, tuned = torch.zeros(elements), torch.randint(-3, 4, (elements,), generator=random).float()
        for density in (0.1, 0.37, 0.8):
            config = TiesConfig(density=density)
            assert torch.equal(run(Ties(config), zero, tuned), ties(zero, [tuned], config))


def test_one_entry_is_kept_at_least():
    assert run(Ties(TiesConfig(density=0.01)), torch.zeros(5), row(1, 3, -2, 0, 0)).tolist() == [0, 3, 0, 0, 0]


def test_the_count_election_follows_more_models_and_the_mass_election_the_larger_sum():
    base, tuned = torch.zeros(1), [row(5), row(-1), row(-1)]
    for elect, expected in (("mass", 5.0), ("count", -1.0)):
        config = TiesConfig(density=1.0, elect=elect)
        assert ties(base, tuned, config).item() == run(Ties(config, 3), base, *tuned).item() == expected


def test_a_tie_of_signs_is_plus_or_the_sign_of_most_entries_of_the_model():
    base = torch.zeros(4)
    first, second = row(2, -1, -1, -1), row(-2, 0, 0, -1)
    plus, majority = TiesConfig(density=1.0), TiesConfig(density=1.0, zero_sign="majority")
    assert run(Ties(plus, 2), base, first, second).tolist() == [2, -1, -1, -1]
    assert run(Ties(majority, 2), base, first, second).tolist() == [-2, -1, -1, -1]
    assert ties(base, [first, second], majority).tolist() == [-2, -1, -1, -1]
    assert run(Ties(majority, 2), base, -first, -second).tolist() == [2, 1, 1, 1]


def test_the_majority_is_counted_over_the_whole_model_after_trimming():
    roles = ("aligned", "tuned", "tuned_2")
    tied = {"aligned": torch.zeros(3), "tuned": row(2, 0.1, 0.1), "tuned_2": row(-2, 0.1, 0.1)}
    other = {"aligned": torch.zeros(2), "tuned": row(-3, -3), "tuned_2": row(-3, -3)}
    sources = {role: Memory({"w": tied[role], "v": other[role]}) for role in ("aligned",)}
    sources |= {role: Memory({"w": tied[role], "v": other[role]}) for role in roles[1:]}
    entries = list(sources["tuned"].entries().values())
    for density, expected in ((0.4, -2.0), (1.0, 2.0)):
        # Untrimmed, two plus and two minus: a balance of zero counts as plus. Trimmed, the small plus entries go.
        edit = with_survey(Ties(TiesConfig(density=density, zero_sign="majority"), 2), sources, entries)
        merged = torch.cat([values for _, values in evaluate(edit, sources, entries[0])])
        assert merged[0].item() == expected


def test_one_threshold_for_the_model_keeps_its_largest_entries_wherever_they_are():
    random = torch.Generator().manual_seed(11)
    shapes = {"c": (40, 5), "a": (7,), "b": (3, 4, 5), "none": (0,)}
    base = {name: torch.zeros(shape) for name, shape in shapes.items()}
    tuned = {name: torch.randint(-6, 7, shape, generator=random).float() for name, shape in shapes.items()}
    tuned["a"] *= 100  # this tensor keeps all it has
    sources = {"aligned": Memory(base), "tuned": Memory(tuned)}
    entries = sorted(sources["tuned"].entries().values(), key=lambda one: one.name)
    whole = torch.cat([tuned[entry.name].flatten() for entry in entries])
    for density in (0.03, 0.2, 0.5, 0.9):
        kept = trim(whole, int(density * whole.numel()))
        edit = with_survey(Ties(TiesConfig(density=density, trim_scope="model")), sources, entries)
        for entry in entries:
            parts = [values for _, values in evaluate(edit, sources, entry, chunk_elements=17)]
            expected, kept = kept[: entry.elements], kept[entry.elements :]
            assert torch.equal(torch.cat([torch.zeros(0), *parts]), expected)


def test_rescaling_by_the_density_or_to_the_sum_of_magnitudes():
    base, tuned = torch.zeros(4), row(4, -3, 2, 1)
    inverse = TiesConfig(density=0.5, rescale="inverse_keep")
    assert run(Ties(inverse), base, tuned).tolist() == [8, -6, 0, 0]
    sums = TiesConfig(density=0.5, rescale="l1")
    expected = row(4 * 10 / 7, -3 * 10 / 7, 0, 0)
    for found in (run(Ties(sums), base, tuned, chunk=3), ties(base, [tuned], sums)):
        assert torch.allclose(found, expected, atol=1e-6)


def test_a_sweep_over_the_coefficient_reduces_once():
    random = torch.Generator().manual_seed(5)
    base, tuned = torch.randn(50, generator=random), torch.randn(50, generator=random)
    edits = [Ties(TiesConfig(coefficient=one)) for one in (0.0, 0.5, 1.0)]
    assert edits[0].shares() is None and edits[1].shares() == edits[2].shares() is not None
    sources = {"aligned": Memory({"w": base}), "tuned": Memory({"w": tuned})}
    entry = sources["tuned"].entries()["w"]
    swept = list(stream.sweep(edits, sources, entry))
    for index, edit in enumerate(edits):
        assert torch.equal(torch.cat([parts[index].values for parts in swept]), run(edit, base, tuned))


def test_a_model_of_which_nothing_is_dropped_is_copied():
    whole = Ties(TiesConfig(density=1.0))
    assert whole.reach("w") is Reach.COPY and whole.copies("w") == "tuned"
    assert Ties().reach("w") is Reach.REDUCED
    assert Ties(TiesConfig(density=1.0), 2).reach("w") is Reach.POINTWISE


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, float("nan"), (0.5, 0.0)])
def test_densities_outside_the_range_are_refused(density):
    with pytest.raises(ConfigError, match="'density' is out of range"):
        TiesConfig(density=density)


def test_misspelt_choices_and_negative_weights_are_refused():
    with pytest.raises(ConfigError, match="'elect' is not a known choice"):
        TiesConfig(elect="max")
    with pytest.raises(ConfigError, match="'rescale' is not a known choice"):
        TiesConfig(rescale="l2")
    with pytest.raises(ConfigError, match="cannot be normalised"):
        TiesConfig(weight=-1.0)
    assert TiesConfig(weight=-1.0, normalize=False).weight == -1.0
