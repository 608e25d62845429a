# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: values in ranges equal the library's; broken and dangerous folders are refused."""

from __future__ import annotations

import gc
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from keelwright.core.errors import DataError, MissingError, UnsafeInputError
from keelwright.models import checkpoint as module
from keelwright.models.checkpoint import Checkpoint
from keelwright.models.dtypes import TORCH_DTYPES

MakeFolder = Callable[..., Path]


def bits(tensor: torch.Tensor) -> bytes:
    return (
        tensor.contiguous().view(torch.uint8).numpy().tobytes()
        if tensor.ndim
        else bytes(tensor.view(1).view(torch.uint8))
    )


def small(folder: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return Checkpoint(folder, "small one")


@pytest.mark.parametrize("shard", [None, "10KB"])
def test_every_tensor_equals_what_the_library_reads(make_folder: MakeFolder, shard: str | None) -> None:
    folder = make_folder("llama", shard=shard, dtype=torch.bfloat16)
    assert (folder / "model.safetensors.index.json").exists() == (shard is not None)
    source = Checkpoint(folder, "some words")
    theirs = {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}
    assert set(source.entries()) == set(theirs)
    for name, entry in source.entries().items():
        values = source.read(name, 0, entry.elements)
        assert values.dtype == torch.bfloat16
        assert torch.equal(values.view(entry.shape), theirs[name])
    assert source.describe() == "some words"
    assert source.config_json()["model_type"] == "llama"


def test_any_range_equals_the_same_range_of_the_whole(tmp_path: Path) -> None:
    whole = torch.randn(37)
    source = small(tmp_path / "m", {"before": torch.ones(3), "x": whole})
    for start in range(0, 38, 5):
        for stop in range(start, 38, 3):
            assert torch.equal(source.read("x", start, stop), whole[start:stop])


def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path) -> None:
    raw = torch.arange(64, dtype=torch.uint8) % 2
    tensors = {name.lower(): raw.view(dtype).clone() for name, dtype in TORCH_DTYPES.items()}
    source = small(tmp_path / "m", tensors)
    for name, tensor in tensors.items():
        assert bits(source.read(name, 0, tensor.numel())) == bits(tensor)
        assert source.entries()[name].dtype == name.upper()


def test_a_read_is_the_readers_own(tmp_path: Path) -> None:
    source = small(tmp_path / "m", {"x": torch.ones(4)})
    source.read("x", 0, 4).zero_()
    assert torch.equal(source.read("x", 0, 4), torch.ones(4))


def test_short_reads_of_the_system_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = small(tmp_path / "m", {"x": torch.arange(50.0)})
    whole_read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda handle, views, at: whole_read(handle, [views[0][:7]], at))
    assert torch.equal(source.read("x", 0, 50), torch.arange(50.0))


def test_a_file_that_shrinks_while_read_is_an_error(tmp_path: Path) -> None:
    source = small(tmp_path / "m", {"x": torch.arange(50.0)})
    os.truncate(tmp_path / "m" / "model.safetensors", 100)
    with pytest.raises(DataError, match="became shorter while it was read"):
        source.read("x", 0, 50)


def test_a_range_outside_the_tensor_is_our_bug(tmp_path: Path) -> None:
    source = small(tmp_path / "m", {"x": torch.arange(5.0), "y": torch.ones(5)})
    with pytest.raises(IndexError):
        source.read("x", 0, 6)


def test_another_process_can_open_it_again(tmp_path: Path) -> None:
    source = small(tmp_path / "m", {"x": torch.arange(5.0)})
    source.read("x", 0, 1)
    copy = pickle.loads(pickle.dumps(source))
    assert torch.equal(copy.read("x", 0, 5), torch.arange(5.0))
    source.close()
    assert torch.equal(source.read("x", 0, 5), torch.arange(5.0))


def test_handles_are_closed_with_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[int] = []
    close = os.close
    source = small(tmp_path / "m", {"x": torch.arange(5.0)})
    source.read("x", 0, 1)
    gc.collect()  # what other tests left behind must not be counted
    monkeypatch.setattr(os, "close", lambda handle: (closed.append(handle), close(handle))[1])
    del source
    gc.collect()
    assert len(closed) == 1


def test_the_digest_tells_one_changed_bit(tmp_path: Path) -> None:
    one = small(tmp_path / "a", {"x": torch.arange(5.0)}).data_digest()
    same = small(tmp_path / "b", {"x": torch.arange(5.0)}).data_digest()
    values = torch.arange(5.0)
    values[3] = torch.nextafter(values[3], torch.tensor(9.0))
    other = small(tmp_path / "c", {"x": values}).data_digest()
    assert one == same != other
    assert one.startswith("sha256:")


def test_the_digest_of_a_large_checkpoint_says_that_it_is_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WHOLE_DIGEST_BYTES", 100)
    one = small(tmp_path / "a", {"x": torch.arange(50.0)}).data_digest()
    other = small(tmp_path / "b", {"x": torch.arange(50.0) + 1}).data_digest()
    assert one.startswith("sampled-sha256:")
    assert one != other


def edit_index(folder: Path, **changes: str | None) -> Path:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for name, shard in changes.items():
        index["weight_map"][name] = shard
    path.write_text(json.dumps(index))
    return path


@pytest.mark.parametrize("escape", ["../secret.safetensors", "/etc/passwd", "..\\secret", "C:\\x", "a/../../b", ""])
def test_an_index_may_not_leave_its_folder(make_folder: MakeFolder, escape: str) -> None:
    folder = make_folder("llama", shard="10KB")
    edit_index(folder, **{"lm_head.weight": escape})
    with pytest.raises(UnsafeInputError) as caught:
        Checkpoint(folder)
    assert "names a file outside its folder" in caught.value.problem
    assert "model.safetensors.index.json" in caught.value.problem
    assert caught.value.found == (escape or "an empty name")
    assert caught.value.fix


def test_a_missing_shard_is_named(make_folder: MakeFolder) -> None:
    folder = make_folder("llama", shard="10KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(MissingError) as caught:
        Checkpoint(folder, "my model")
    assert caught.value.problem == f"'my model' lacks the shard '{shard.name}'."
    assert "download or copy the missing shard" in str(caught.value.fix)


def test_an_index_that_lists_what_is_not_there_is_refused(make_folder: MakeFolder) -> None:
    folder = make_folder("llama", shard="10KB")
    shard = sorted(folder.glob("model-*.safetensors"))[0].name
    edit_index(folder, **{"made.up": shard})
    with pytest.raises(DataError, match="lists a tensor that its shard does not hold") as caught:
        Checkpoint(folder)
    assert "made.up" in str(caught.value.expected)


def test_a_shard_that_holds_what_the_index_omits_is_refused(make_folder: MakeFolder) -> None:
    folder = make_folder("llama", shard="10KB")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shards = sorted(set(index["weight_map"].values()))
    extra = load_file(folder / shards[0]) | {"stowaway": torch.ones(1)}
    save_file(extra, folder / shards[0], metadata={"format": "pt"})
    with pytest.raises(DataError, match="holds a tensor that the index does not place there") as caught:
        Checkpoint(folder)
    assert "stowaway" in str(caught.value.expected)


def test_an_index_without_a_map_is_refused(make_folder: MakeFolder) -> None:
    folder = make_folder("llama", shard="10KB")
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(DataError, match="has no weight_map"):
        Checkpoint(folder)


def test_a_dtype_that_torch_lacks_is_refused_on_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(TORCH_DTYPES, "F8_E8M0", raising=False)  # as before torch 2.7
    source = small(tmp_path / "m", {"x": torch.ones(8)})
    path = tmp_path / "m" / "model.safetensors"
    header = json.dumps({"x": {"dtype": "F8_E8M0", "shape": [8], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    source = Checkpoint(tmp_path / "m", "scales")
    with pytest.raises(DataError, match="Tensor 'x' of 'scales' cannot be read"):
        source.read("x", 0, 8)
