# SPDX-License-Identifier: Apache-2.0
"""Preference pairs from JSON lines."""

import pytest

from keelwright.core.errors import DataError, MissingError
from keelwright.data.preferences import PreferenceRow, read_preference_rows

GOOD = '{"prompt": "p", "chosen": "a", "rejected": "b"}\n'


def test_rows_are_read_with_their_system_text(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(GOOD + "\n" + '{"prompt": "q", "chosen": "c", "rejected": "d", "system": "s"}\n')
    assert read_preference_rows(path) == [PreferenceRow("p", "a", "b"), PreferenceRow("q", "c", "d", "s")]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('{"prompt": "p", "chosen": "a"}', "no text in rejected"),
        ('{"prompt": " ", "chosen": 3, "rejected": "b"}', "no text in prompt, chosen"),
        ('["p"]', "no text in prompt, chosen, rejected"),
        ('{"prompt": "p", "chosen": "a", "rejected": "b", "system": 1}', "system = 1"),
    ],
)
def test_a_malformed_row_is_named_by_its_line(tmp_path, line, found):
    path = tmp_path / "pairs.jsonl"
    path.write_text(GOOD + line + "\n")
    with pytest.raises(DataError, match="line 2 is not a preference pair") as caught:
        read_preference_rows(path)
    assert caught.value.found == found


def test_what_is_not_json_and_empty_and_missing_files_are_errors(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("{")
    with pytest.raises(DataError, match="line 1 is not JSON"):
        read_preference_rows(path)
    path.write_text("\n")
    with pytest.raises(DataError, match="holds no pairs"):
        read_preference_rows(path)
    with pytest.raises(MissingError):
        read_preference_rows(tmp_path / "none")
