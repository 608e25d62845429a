# SPDX-License-Identifier: Apache-2.0
import errno
from pathlib import Path

import pytest
import torch

from keelwright.core.errors import StorageError
from keelwright.models.loading import load
from keelwright.models.saving import save


def test_saved_model_loads_with_the_same_weights_and_the_live_one_stays(tmp_path):
    model = load("lab:workshop/base")
    model.module.float()
    folder = save(model, tmp_path / "out", dtype=torch.bfloat16)
    again = load(folder)
    assert again.module.dtype is torch.bfloat16
    assert model.module.dtype is torch.float32
    for name, value in again.module.state_dict().items():
        assert torch.equal(value, model.module.state_dict()[name].bfloat16())
    assert again.tokenizer.chat_template == model.tokenizer.chat_template
    assert all(file.stat().st_mode & 0o044 for file in folder.iterdir())
    assert not (tmp_path / "out.partial").exists()


def test_full_disk_is_named_and_leaves_no_folder(tmp_path, monkeypatch):
    model = load("lab:workshop/base")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "chmod", full)
    with pytest.raises(StorageError, match="is full"):
        save(model, tmp_path / "out", dtype=torch.bfloat16)
    assert not (tmp_path / "out").exists()
