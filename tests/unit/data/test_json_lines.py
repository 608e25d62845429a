# SPDX-License-Identifier: Apache-2.0
import pytest

from keelwright.core.errors import DataError, MissingError
from keelwright.data.json_lines import read_lines


def test_lines_keep_their_numbers_and_blank_ones_are_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes("\ufeff{}\n\n  \n{\u2028}\n".encode())
    assert read_lines(path) == [(1, "{}"), (4, "{\u2028}")]


def test_missing_file_and_folder_are_told_apart(tmp_path):
    with pytest.raises(MissingError, match=r"no file(.|\n)*found:    nothing"):
        read_lines(tmp_path / "absent")
    with pytest.raises(MissingError, match="found:    a folder"):
        read_lines(tmp_path)


def test_other_encodings_are_refused(tmp_path):
    (tmp_path / "a").write_bytes(b"\xff\xfe{")
    with pytest.raises(DataError, match="not UTF-8"):
        read_lines(tmp_path / "a")
