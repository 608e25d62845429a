# SPDX-License-Identifier: Apache-2.0
"""Sources around sources."""

import os

import pytest
import torch

from keelwright.core.errors import NumericalError
from keelwright.models.adapters import AdaptedCheckpoint, LoraFactors, read_adapter
from keelwright.models.checkpoint import Checkpoint
from keelwright.weights.sources import AliasedSource, file_stamps, relative_distance, source_digest

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}


def test_an_alias_reads_the_stored_tensor_and_hidden_names_are_gone(memory):
    seen = AliasedSource(memory(TENSORS), {"head": "a"}, hidden=("b",))
    assert set(seen.entries()) == {"a", "head"}
    assert seen.entries()["head"].name == "head" and seen.entries()["head"].shape == (2, 3)
    assert seen.read("head", 1, 4).tolist() == [1.0, 2.0, 3.0]
    assert seen.describe() == "in memory"


def test_an_alias_wins_over_a_stored_tensor_of_its_name(memory):
    seen = AliasedSource(memory({**TENSORS, "c": torch.zeros(4)}), {"c": "b"})
    assert seen.read("c", 0, 2).tolist() == [1.0, 1.0]


def test_digests_follow_the_content(memory):
    digest = source_digest(memory(TENSORS))
    assert digest == source_digest(memory(TENSORS, "other words"))
    assert digest != source_digest(memory({**TENSORS, "b": torch.zeros(4)}))
    assert digest != source_digest(memory({**TENSORS, "a": TENSORS["a"].view(3, 2)}))
    assert digest == source_digest(AliasedSource(memory(TENSORS)))


def test_a_checkpoint_gives_its_own_digest(make_folder):
    opened = Checkpoint(make_folder("m", TENSORS))
    assert source_digest(opened) == opened.data_digest()


def test_an_adapter_over_a_base_in_memory_is_digested_with_the_bases_values(memory):
    def adapted(base):
        factors = {"a": LoraFactors(torch.ones(2, 1), torch.ones(1, 3), 0.5)}
        return source_digest(AdaptedCheckpoint(memory(base), factors=factors))

    assert adapted(TENSORS) == adapted(TENSORS)
    assert adapted(TENSORS) != adapted({**TENSORS, "b": torch.zeros(4)})
    assert adapted(TENSORS) != source_digest(memory(TENSORS))


def test_an_adapter_on_disk_changes_the_digest(tmp_path, make_llama, make_lora):
    base = tmp_path / "base"
    make_llama().save_pretrained(base)
    opened = Checkpoint(base)
    digests = {
        source_digest(AdaptedCheckpoint(opened, adapters=[read_adapter(make_lora(base, f"l{seed}", seed=seed))]))
        for seed in (0, 1)
    }
    assert len(digests | {source_digest(opened)}) == 3


def test_a_parent_and_its_child_are_near_and_strangers_are_far(memory):
    torch.manual_seed(0)
    base = {f"layer.{index}": torch.randn(30, 30) for index in range(40)}
    child = {name: one + 0.1 * torch.randn(30, 30) for name, one in base.items()}
    stranger = {name: torch.randn(30, 30) for name in base}
    assert relative_distance(memory(base), memory(child)) == pytest.approx(0.1, rel=0.05)
    assert relative_distance(memory(base), memory(stranger)) == pytest.approx(2**0.5, rel=0.05)
    assert relative_distance(memory(base), memory(base)) == 0.0


def test_only_a_sample_is_read_for_the_distance(memory):
    reads = []

    class Watched(memory):
        def read(self, name, start, stop):
            reads.append(stop - start)
            return super().read(name, start, stop)

    tensors = {f"w{index}": torch.ones(200, 200) for index in range(60)}
    relative_distance(Watched(tensors), memory(tensors))
    assert len(reads) <= 24 and max(reads) == 1 << 14


def test_a_bad_number_in_the_sample_is_named(memory):
    bad = {**TENSORS, "a": torch.tensor([[0.0, 1.0, float("inf")], [0.0, 0.0, 0.0]])}
    with pytest.raises(NumericalError, match=r"'models/tuned'.*'a', element 2"):
        relative_distance(memory(TENSORS), memory(bad, "models/tuned"))


def test_stamps_follow_the_files_of_a_source(make_folder, memory):
    folder = make_folder("m", TENSORS, files=2)
    seen = AliasedSource(Checkpoint(folder))
    before = file_stamps(seen)
    assert len(before) == 2 and before == file_stamps(seen)
    first = sorted(folder.glob("*.safetensors"))[0]
    os.utime(first, ns=(1, 1))
    assert file_stamps(seen) != before
    assert file_stamps(memory(TENSORS)) == {}
