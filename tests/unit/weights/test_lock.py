# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from keelwright.core.errors import DataError, MissingError, UnsafeInputError
from keelwright.models.checkpoint import Checkpoint
from keelwright.repair.linear import Linear
from keelwright.weights.lock import LOCK_FILE, verify
from keelwright.weights.plan import plan_edit
from keelwright.weights.write import materialise


@pytest.fixture
def written(make_folder: Callable[..., Path], make_tensors: Callable[..., dict[str, Tensor]], tmp_path: Path) -> Path:
    folders = {role: make_folder(role, make_tensors(seed)) for seed, role in enumerate(("aligned", "tuned"))}
    plan = plan_edit(Linear(), {role: Checkpoint(folder) for role, folder in folders.items()})
    return materialise(plan, tmp_path / "out", companions_from=folders["tuned"]).folder


def test_an_untouched_output_verifies(written: Path) -> None:
    found = verify(written)
    assert found["files"] == 4
    assert found["bytes"] == sum(path.stat().st_size for path in written.iterdir() if path.name != LOCK_FILE)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "README.md"])
def test_a_single_changed_byte_is_found(written: Path, name: str) -> None:
    raw = bytearray((written / name).read_bytes())
    raw[-1] ^= 1
    (written / name).write_bytes(raw)
    with pytest.raises(DataError) as caught:
        verify(written)
    assert caught.value.problem == f"'{written / name}' has changed since it was written."
    assert str(caught.value.expected).startswith("SHA-256 ")


def test_a_lost_file_is_missing(written: Path) -> None:
    (written / "tokenizer.json").unlink()
    with pytest.raises(MissingError, match=r"lacks 'tokenizer\.json'"):
        verify(written)


def test_a_folder_of_another_program_cannot_be_verified(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=f"has no {LOCK_FILE}"):
        verify(tmp_path)


def test_a_lock_that_points_outside_its_folder_is_unsafe(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text(json.dumps({"files": {"../secret": "0"}}))
    with pytest.raises(UnsafeInputError):
        verify(tmp_path)


def test_a_lock_without_files_is_damaged(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text("{}")
    with pytest.raises(DataError, match="lists no files"):
        verify(tmp_path)
