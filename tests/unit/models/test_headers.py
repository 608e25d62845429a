# SPDX-License-Identifier: Apache-2.0
"""Headers: the safetensors library's files are read alike, and every lie is caught."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from keelwright.core.errors import DataError, MissingError
from keelwright.models.headers import MAX_HEADER_BYTES, read_header, tensor_bytes

HONEST: dict[str, Any] = {
    "first": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "second": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def write(path: Path, header: Any, data: int = 32, *, raw: bytes | None = None, length: int | None = None) -> Path:
    text = json.dumps(header).encode() if raw is None else raw
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data))
    return path


def changed(tensor: str, **fields: Any) -> dict[str, Any]:
    return {**HONEST, tensor: {**HONEST[tensor], **fields}}


def test_an_honest_header_gives_every_tensor_and_its_bytes(tmp_path: Path) -> None:
    header = read_header(write(tmp_path / "a.safetensors", {"__metadata__": {"format": "pt"}, **HONEST}))
    assert list(header.tensors) == ["first", "second"]
    assert header.tensors["first"].entry.shape == (2, 3)
    assert header.tensors["second"].begin - header.data_start == 24
    assert header.tensors["second"].end == header.file_bytes
    assert header.metadata == {"format": "pt"}


def test_files_of_the_library_are_read_alike(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 4, dtype=torch.float16),
        "flags": torch.tensor([True, False]),
        "matrix": torch.randn(3, 5, dtype=torch.bfloat16),
        "ids": torch.arange(7),
    }
    path = tmp_path / "library.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    assert set(header.tensors) == set(tensors)
    with safe_open(path, "pt") as theirs:
        for name, stored in header.tensors.items():
            view = theirs.get_slice(name)
            assert (stored.entry.dtype, list(stored.entry.shape)) == (view.get_dtype(), view.get_shape())
            assert stored.end - stored.begin == tensor_bytes(stored.entry)


def test_a_file_without_tensors_is_honest(tmp_path: Path) -> None:
    assert not read_header(write(tmp_path / "a.safetensors", {}, data=0)).tensors


@pytest.mark.parametrize(
    ("header", "data", "problem", "found"),
    [
        (changed("second", data_offsets=[16, 24]), 32, "'second' overlaps the tensor before it", "byte 16"),
        (changed("second", data_offsets=[25, 33]), 33, "'second' leaves a hole before it", "byte 25"),
        (changed("first", data_offsets=[0, 20]), 32, "'first' does not fit its range of bytes", "20 bytes"),
        (changed("first", data_offsets=[24, 0]), 32, "'first' has an impossible range", "[24, 0]"),
        (changed("first", data_offsets=[-8, 16]), 32, "'first' has an impossible range", "[-8, 16]"),
        (changed("first", data_offsets=[0]), 32, "'first' has an impossible range", "[0]"),
        (changed("first", shape=[2, -3]), 32, "'first' has an impossible shape", "[2, -3]"),
        (changed("first", shape=[True, 3]), 32, "'first' has an impossible shape", "[True, 3]"),
        (changed("first", shape="2x3"), 32, "'first' has an impossible shape", "2x3"),
        (changed("first", dtype="F128"), 32, "'first' has an unknown dtype", "'F128'"),
        (changed("first", dtype=["F32"]), 32, "'first' has an unknown dtype", "F32"),
        ({**HONEST, "first": {"dtype": "F32"}}, 32, "entry of tensor 'first' is malformed", "dtype"),
        ({**HONEST, "first": 3}, 32, "entry of tensor 'first' is malformed", "int"),
        (HONEST, 30, "is cut short (the last tensor is 'second')", "bytes"),
        (HONEST, 40, "has bytes that no tensor owns", "bytes"),
        ({**HONEST, "__metadata__": {"format": 1}}, 32, "__metadata__ is not text", "1"),
        ([1, 2], 32, "not a JSON object", "list"),
    ],
)
def test_every_lie_names_the_file_and_what_is_wrong(
    tmp_path: Path, header: Any, data: int, problem: str, found: str
) -> None:
    path = write(tmp_path / "liar.safetensors", header, data)
    with pytest.raises(DataError) as caught:
        read_header(path)
    assert str(path) in caught.value.problem
    assert problem in caught.value.problem
    assert found in str(caught.value.found)
    assert "download or copy the file again" in str(caught.value.fix)


def test_a_name_given_twice_is_refused(tmp_path: Path) -> None:
    row = json.dumps(HONEST["first"])
    path = write(tmp_path / "a.safetensors", None, 24, raw=f'{{"first": {row}, "first": {row}}}'.encode())
    with pytest.raises(DataError, match="names 'first' twice"):
        read_header(path)


@pytest.mark.parametrize("raw", [b"{", b"\xff\xfe{}", b'{"a": ' + b"[" * 100_000])
def test_a_header_that_is_not_json_is_refused(tmp_path: Path, raw: bytes) -> None:
    with pytest.raises(DataError, match="not JSON"):
        read_header(write(tmp_path / "a.safetensors", None, 32, raw=raw))


@pytest.mark.parametrize("length", [10_000, MAX_HEADER_BYTES + 1, 2**63])
def test_a_length_beyond_the_file_is_refused(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "a.safetensors", HONEST, length=length)
    with pytest.raises(DataError, match=r"ends inside its header|length is not believable"):
        read_header(path)


def test_a_file_shorter_than_its_length_field_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"\x01\x00")
    with pytest.raises(DataError, match="too short"):
        read_header(path)


def test_every_truncation_of_a_real_file_is_caught(tmp_path: Path) -> None:
    path = tmp_path / "whole.safetensors"
    save_file({"a": torch.randn(3), "b": torch.randn(2, 2)}, path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError):
            read_header(path)


def test_a_missing_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="There is no file"):
        read_header(tmp_path / "none.safetensors")
