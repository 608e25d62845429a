# SPDX-License-Identifier: Apache-2.0
"""Plans: everything that can fail, fails before a byte."""

import shutil
from types import SimpleNamespace

import psutil
import pytest
import torch

from keelwright.core.errors import ConfigError, DataError, ModelMismatchError, ResourceError, StorageError
from keelwright.core.protocols import Reach, TensorEntry
from keelwright.models.checkpoint import Checkpoint
from keelwright.repair.linear import Linear, LinearConfig
from keelwright.weights.journal import begin
from keelwright.weights.plan import plan_edit, require_same_tensors, require_space, untie

HALF = Linear(LinearConfig(0.5))
TENSORS = {"a.weight": torch.ones(4, 3), "ids": torch.arange(4)}


def pair(memory, aligned=TENSORS, tuned=TENSORS):
    return {"aligned": memory(aligned, "models/aligned"), "tuned": memory(tuned, "models/tuned")}


def test_a_plan_counts_tensors_bytes_and_files(memory):
    plan = plan_edit(HALF, pair(memory), max_shard_bytes=48)
    assert [shard.file for shard in plan.shards] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert plan.data_bytes == 4 * 3 * 4 + 4 * 8
    assert plan.total_bytes == plan.data_bytes + sum(len(shard.header) for shard in plan.shards)
    assert {one.entry.name: one.reach for one in plan.tensors} == {"a.weight": Reach.POINTWISE, "ids": Reach.COPY}
    rows = dict(plan.describe())
    assert rows["aligned"] == "models/aligned" and rows["tensors"] == "2: 1 computed, 1 copied"
    assert rows["output"].endswith("in 2 files")


def test_the_digest_follows_settings_content_and_layout_only(memory):
    digest = plan_edit(HALF, pair(memory)).digest
    assert plan_edit(HALF, pair(memory)).digest == digest
    assert plan_edit(Linear(LinearConfig(0.25)), pair(memory)).digest != digest
    assert plan_edit(HALF, pair(memory), max_shard_bytes=20).digest != digest
    assert plan_edit(HALF, pair(memory, tuned={**TENSORS, "a.weight": torch.zeros(4, 3)})).digest != digest


def test_a_missing_role_is_an_error(memory):
    with pytest.raises(ConfigError, match="'tuned'") as caught:
        plan_edit(HALF, {"aligned": memory(TENSORS)})
    assert caught.value.expected == "models for aligned, tuned" and caught.value.found == "models for aligned"


@pytest.mark.parametrize("limit", [0, -1])
def test_a_shard_limit_below_one_byte_is_an_error(memory, limit):
    with pytest.raises(ConfigError, match="max_shard_bytes"):
        plan_edit(HALF, pair(memory), max_shard_bytes=limit)


def test_other_tensors_are_an_error_that_names_them(memory):
    with pytest.raises(ModelMismatchError) as caught:
        plan_edit(HALF, pair(memory, tuned={**TENSORS, "b": torch.ones(1), "c": torch.ones(1)}))
    assert caught.value.problem == "'aligned' and 'tuned' do not have the same tensors."
    assert caught.value.expected == "2 tensors as in 'aligned' (models/aligned)"
    assert caught.value.found == "4 in 'tuned' (models/tuned); only in 'tuned': b, c"
    assert "same architecture" in caught.value.fix


def test_an_adapter_given_as_a_model_is_recognised(memory):
    with pytest.raises(ModelMismatchError) as caught:
        plan_edit(HALF, pair(memory, tuned={**TENSORS, "a.lora_A.weight": torch.ones(1)}))
    assert caught.value.fix == "'tuned' looks like an adapter: pass it as models/aligned+models/tuned"


def test_other_shapes_are_an_error_that_shows_both(memory):
    with pytest.raises(ModelMismatchError) as caught:
        plan_edit(HALF, pair(memory, tuned={**TENSORS, "a.weight": torch.ones(5, 3)}))
    assert "a.weight [4, 3]" in caught.value.expected and "[5, 3]" in caught.value.found


def test_buffers_that_differ_are_an_error(memory):
    with pytest.raises(ModelMismatchError, match="differ in 'ids', which is not made of weights"):
        plan_edit(HALF, pair(memory, tuned={**TENSORS, "ids": torch.arange(4) + 1}))


def test_a_weight_against_an_integer_is_an_error(memory):
    with pytest.raises(ModelMismatchError, match="'ids'"):
        plan_edit(HALF, pair(memory, tuned={**TENSORS, "ids": torch.arange(4.0)}))


def test_eight_bit_weights_are_refused_even_where_they_differ(memory):
    eight = {"a.weight": torch.ones(4).to(torch.float8_e4m3fn)}
    other = {"a.weight": torch.zeros(4).to(torch.float8_e4m3fn)}
    with pytest.raises(DataError) as caught:
        plan_edit(HALF, pair(memory, eight, other))
    assert "F8_E4M3" in caught.value.found and "unquantised" in caught.value.fix


def test_too_little_memory_is_an_error(memory, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10))
    with pytest.raises(ResourceError, match="more memory"):
        plan_edit(HALF, pair(memory))


def test_memory_does_not_grow_with_the_model(memory):
    class Huge(memory):
        def entries(self):
            return {"w": TensorEntry("w", "BF16", (1 << 40,))}

        def data_digest(self):
            return "sha256:of a terabyte"

    huge = {"aligned": Huge({}), "tuned": Huge({})}
    assert plan_edit(HALF, pair(memory)).memory_bytes < plan_edit(HALF, huge).memory_bytes < 64 << 20


def fill_disk(monkeypatch, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=free))


def test_too_little_room_is_an_error(memory, tmp_path, monkeypatch):
    fill_disk(monkeypatch, 1000)
    with pytest.raises(StorageError) as caught:
        plan_edit(HALF, pair(memory), out=tmp_path / "deep" / "out")
    assert "too little room" in caught.value.problem and caught.value.found == "1.00 kB free"


def test_room_that_an_interrupted_write_has_taken_counts(memory, tmp_path, monkeypatch):
    tensors = {"w": torch.zeros(1 << 20)}
    plan = plan_edit(HALF, pair(memory, tensors, tensors))
    fill_disk(monkeypatch, 51_000_000)
    with pytest.raises(StorageError):
        require_space(plan, tmp_path / "out")
    partial = begin(tmp_path / "out", digest=plan.digest, summary={})
    (partial / "model.safetensors").write_bytes(b"\x01" * (4 << 20))
    require_space(plan, tmp_path / "out")


def test_agreeing_ties_are_left_alone(memory):
    tied = {"model.embed_tokens.weight": torch.ones(2, 2)}
    sources, changes, notes = untie(pair(memory, tied, tied))
    assert not changes and not notes
    assert set(sources["aligned"].entries()) == set(tied)


@pytest.mark.parametrize("tying", ["aligned", "tuned"])
def test_a_tied_head_is_read_from_the_embedding_where_the_other_model_has_its_own(memory, tying):
    embedding = torch.arange(4.0).view(2, 2)
    tied = {"model.embed_tokens.weight": embedding}
    untied = {**tied, "lm_head.weight": -embedding}
    given = pair(memory, *((tied, untied) if tying == "aligned" else (untied, tied)))
    sources, changes, notes = untie(given)
    require_same_tensors(sources, layout="tuned")
    assert torch.equal(sources[tying].read("lm_head.weight", 0, 4), embedding.flatten())
    assert changes == ({"tie_word_embeddings": False} if tying == "tuned" else {})
    assert len(notes) == 1 and f"'{tying}' ties lm_head.weight" in notes[0]


def tied_llama(make_folder, make_llama, name, **extra):
    model = make_llama(tied=True)
    tensors = {key: value.clone() for key, value in model.state_dict().items() if key != "lm_head.weight"}
    return Checkpoint(make_folder(name, {**tensors, **extra}, **model.config.to_dict()))


@pytest.mark.parametrize("both", [False, True])
def test_a_second_copy_of_a_tied_head_is_left_out(make_folder, make_llama, both):
    stale = {"lm_head.weight": torch.full((40, 16), 9.0)}
    sources = {
        "aligned": tied_llama(make_folder, make_llama, "a", **(stale if both else {})),
        "tuned": tied_llama(make_folder, make_llama, "t", **stale),
    }
    plan = plan_edit(HALF, sources)
    assert "lm_head.weight" not in {one.entry.name for one in plan.tensors}
    assert len(plan.notes) == 1 + both and "second copy" in plan.notes[-1]
    assert plan.config_changes == {}


def test_a_stale_copy_of_a_tied_head_is_not_merged_with_an_untied_one(make_folder, make_llama):
    model = make_llama(tied=False)
    untied = Checkpoint(
        make_folder("t", {k: v.clone() for k, v in model.state_dict().items()}, **model.config.to_dict())
    )
    tied = tied_llama(make_folder, make_llama, "a", **{"lm_head.weight": torch.full((40, 16), 9.0)})
    sources, changes, _ = untie({"aligned": tied, "tuned": untied})
    embedding = tied.read("model.embed_tokens.weight", 0, 640)
    assert torch.equal(sources["aligned"].read("lm_head.weight", 0, 640), embedding)
    assert changes == {}
