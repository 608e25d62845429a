# SPDX-License-Identifier: Apache-2.0
"""The model that a run was for is never written over anything else."""

import json

import pytest

from keelwright.arena.keeping import RUN_FILE, Output, require_free
from keelwright.core.errors import StorageError
from keelwright.models.loading import load
from keelwright.training.loop import TrainResult

NOTHING = TrainResult((), 0, 0.0)


@pytest.fixture
def output(tmp_path):
    model = load("lab:workshop/aligned", offline=True)
    return Output(tmp_path / "out", model, model.module.dtype, mark="mine")


def test_a_run_writes_its_model_again_after_it_was_cut_off(output):
    output.write(NOTHING)
    (output.folder / "model.safetensors").unlink()
    output.write(NOTHING)
    assert (output.folder / "model.safetensors").is_file()
    assert json.loads((output.folder / RUN_FILE).read_text()) == {"run": "mine"}


def test_what_came_into_the_folder_meanwhile_is_kept(output):
    output.folder.mkdir()
    (output.folder / "mine.txt").write_text("precious")
    with pytest.raises(StorageError):
        output.write(NOTHING)
    assert (output.folder / "mine.txt").read_text() == "precious"


def test_a_model_of_another_run_is_kept(output):
    output.write(NOTHING)
    with pytest.raises(StorageError):
        require_free(output.folder, "another")
    require_free(output.folder, "mine")
