# SPDX-License-Identifier: Apache-2.0
import errno
import os

import pytest

from keelwright.core.errors import ConfigError, StorageError
from keelwright.runs.places import disk_errors, require_apart, require_place


def test_a_folder_that_can_be_made_is_fine(tmp_path):
    require_place(tmp_path / "a" / "b", flag="--out")
    require_place(tmp_path, flag="--out")
    assert not (tmp_path / "a").exists()


def test_a_file_among_the_parents_is_named(tmp_path):
    (tmp_path / "notes").write_text("x")
    with pytest.raises(StorageError, match="cannot be made") as caught:
        require_place(tmp_path / "notes" / "run", flag="--run")
    assert str(tmp_path / "notes") in caught.value.found
    assert caught.value.fix == "give --run another path"


def test_a_read_only_place_is_told_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(StorageError, match="cannot be written") as caught:
        require_place(tmp_path / "run", flag="--out")
    assert "read-only for you" in caught.value.found


@pytest.mark.parametrize("run", ["fixed", "fixed/run", "x/../fixed/run"])
def test_a_run_inside_the_models_folder_is_refused(tmp_path, run):
    (tmp_path / "x").mkdir()
    with pytest.raises(ConfigError, match="lies inside the folder of the model"):
        require_apart(tmp_path / "fixed", tmp_path / run)


def test_a_model_inside_its_run_is_fine(tmp_path):
    require_apart(tmp_path / "run" / "repaired", tmp_path / "run")
    require_apart(tmp_path / "fixed", tmp_path / "fixed-run")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EIO, errno.ENOTDIR])
def test_every_complaint_of_the_disk_becomes_a_storage_error(number, tmp_path):
    with pytest.raises(StorageError) as caught, disk_errors(tmp_path):
        raise OSError(number, os.strerror(number))
    assert caught.value.found == os.strerror(number)
    assert caught.value.fix
