# SPDX-License-Identifier: Apache-2.0
import errno
import os

import pytest

from keelwright.core.errors import StorageError
from keelwright.core.files import require_new_folder, storage_errors, write_atomic


def test_write_replaces_whole(tmp_path):
    target = tmp_path / "deep" / "a.json"
    write_atomic(target, "one")
    write_atomic(target, b"two")
    assert target.read_text() == "two"
    assert [child.name for child in target.parent.iterdir()] == ["a.json"]


def test_failed_write_keeps_the_old_content(tmp_path, monkeypatch):
    target = tmp_path / "a.json"
    write_atomic(target, "old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="is full") as caught:
        write_atomic(target, "new")
    assert "it resumes" in str(caught.value)
    assert target.read_text() == "old"
    assert [child.name for child in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_read_only_place_is_named(number, tmp_path):
    with pytest.raises(StorageError, match="cannot be written"), storage_errors(tmp_path):
        raise OSError(number, "no")


def test_other_errors_pass(tmp_path):
    with pytest.raises(OSError, match="loop"), storage_errors(tmp_path):
        raise OSError(errno.ELOOP, "loop")


def test_new_folder_may_be_absent_or_empty_only(tmp_path):
    require_new_folder(tmp_path / "absent", flag="--out")
    require_new_folder(tmp_path, flag="--out")
    (tmp_path / "a").write_text("")
    with pytest.raises(StorageError, match=r"not empty(.|\n)*found:    a(.|\n)*give --out another path"):
        require_new_folder(tmp_path, flag="--out")
    with pytest.raises(StorageError, match="is a file"):
        require_new_folder(tmp_path / "a", flag="--out")
