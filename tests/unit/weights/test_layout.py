# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from keelwright.core.protocols import TensorEntry
from keelwright.models.dtypes import STORED_NAMES
from keelwright.models.headers import read_header
from keelwright.weights.layout import build_shard, index_json, lay_out, natural_key
from keelwright.weights.stream import as_bytes

METADATA = {"format": "pt"}


def entries_of(tensors: dict[str, Tensor]) -> list[TensorEntry]:
    return [TensorEntry(name, STORED_NAMES[one.dtype], tuple(one.shape)) for name, one in tensors.items()]


def test_a_file_of_every_dtype_equals_that_of_the_safetensors_library() -> None:
    dtypes = [
        torch.bfloat16, torch.float32, torch.int64, torch.bool, torch.float16, torch.float64, torch.int32,
        torch.uint8, torch.int16, torch.int8, torch.uint16, torch.uint32, torch.uint64,
    ]  # fmt: skip
    tensors = {f"t{index % 3}.{index}": torch.ones(index % 4, 3).to(dtype) for index, dtype in enumerate(dtypes)}
    tensors['names with "quotes", é and \\'] = torch.tensor(1.5)
    shard = build_shard("model.safetensors", entries_of(tensors), METADATA)
    data = b"".join(bytes(as_bytes(tensors[slot.entry.name].flatten())) for slot in shard.slots)
    assert shard.header + data == save(tensors, metadata=METADATA)
    assert shard.size == len(shard.header) + len(data)


def test_headers_are_padded_and_accepted_by_our_own_parser(tmp_path: Path) -> None:
    for length in range(9):
        shard = build_shard("m", [TensorEntry("n" * (length + 1), "F32", (2,))], METADATA)
        assert len(shard.header) % 8 == 0
        path = tmp_path / f"{length}.safetensors"
        path.write_bytes(shard.header + bytes(8))
        assert list(read_header(path).tensors) == ["n" * (length + 1)]


def test_tensors_fill_files_in_natural_order_and_never_exceed_the_limit() -> None:
    entries = [TensorEntry(f"layers.{index}.w", "F32", (10,)) for index in (10, 2, 1, 0)]
    shards = lay_out(entries, max_shard_bytes=80, metadata=METADATA)
    assert [shard.file for shard in shards] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert [{slot.entry.name for slot in shard.slots} for shard in shards] == [
        {"layers.0.w", "layers.1.w"},
        {"layers.2.w", "layers.10.w"},
    ]


def test_a_tensor_above_the_limit_has_a_file_of_its_own() -> None:
    entries = [TensorEntry(name, "F32", (size,)) for name, size in (("a", 1), ("b", 100), ("c", 1))]
    shards = lay_out(entries, max_shard_bytes=40, metadata=METADATA)
    assert [[slot.entry.name for slot in shard.slots] for shard in shards] == [["a"], ["b"], ["c"]]


def test_one_file_has_no_index_and_the_usual_name() -> None:
    shards = lay_out([TensorEntry("a", "F32", (1,))], max_shard_bytes=1000, metadata=METADATA)
    assert [shard.file for shard in shards] == ["model.safetensors"]
    assert index_json(shards) is None


def test_the_index_places_every_tensor_and_counts_the_bytes() -> None:
    entries = [TensorEntry(name, "BF16", (3,)) for name in ("a", "b", "c")]
    text = index_json(lay_out(entries, max_shard_bytes=12, metadata=METADATA))
    assert text is not None
    index = json.loads(text)
    assert index["metadata"] == {"total_parameters": 9, "total_size": 18}
    assert index["weight_map"] == {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00001-of-00002.safetensors",
        "c": "model-00002-of-00002.safetensors",
    }


def test_the_layout_does_not_depend_on_the_order_of_the_inputs(make_tensors: Callable[..., dict[str, Tensor]]) -> None:
    entries = entries_of(make_tensors())
    forwards = lay_out(entries, max_shard_bytes=200, metadata=METADATA)
    assert lay_out(reversed(entries), max_shard_bytes=200, metadata=METADATA) == forwards


def test_natural_order_compares_numbers_as_numbers() -> None:
    assert sorted(["l.10", "l.9", "k", "l.9.a"], key=natural_key) == ["k", "l.9", "l.9.a", "l.10"]
