# SPDX-License-Identifier: Apache-2.0
"""Tokens read from files: ids, flags, and damage that is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from keelwright.core.errors import DataError, MissingError
from keelwright.models.token_table import read_tokens


def test_tokens_are_those_of_transformers(tmp_path: Path, make_tokenizer: object) -> None:
    made: PreTrainedTokenizerFast = make_tokenizer()  # type: ignore[operator]
    made.add_tokens(["plainly added"])
    made.save_pretrained(tmp_path)
    table = read_tokens(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert table.ids == loaded.get_vocab()
    assert len(table) == len(loaded) == table.size
    assert set(table.flags) == {str(one) for one in loaded.added_tokens_decoder.values()}
    for one in loaded.added_tokens_decoder.values():
        assert table.flags[one.content] == (one.special, one.normalized, one.single_word, one.lstrip, one.rstrip)
    assert table.kind == "WordLevel"
    assert table.describe("<user>").endswith("(added: special)")
    assert table.describe("nobody") == "absent"


def test_a_folder_without_tokens_says_what_it_needs(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(MissingError, match=r"tokens of .* cannot be read") as caught:
        read_tokens(tmp_path)
    assert "save it again, which writes tokenizer.json" in str(caught.value.fix)


def test_older_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\na\nb\n")
    assert read_tokens(tmp_path).ids == {"[PAD]": 0, "a": 1, "b": 2}
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    (tmp_path / "added_tokens.json").write_text('{"<x>": 2}')
    table = read_tokens(tmp_path)
    assert (table.kind, table.size, len(table)) == ("BPE", 3, 3)
    assert table.describe("<x>") == "id 2 (added)"
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": [["<unk>", 0.0], ["a", -1.0]]}}))
    table = read_tokens(tmp_path)
    assert (table.kind, table.ids) == ("Unigram", {"<unk>": 0, "a": 1, "<x>": 2})


def test_tokenizer_json_wins_over_the_settings(tmp_path: Path) -> None:
    content = {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1, "content": "<x>", "special": True}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    settings = {"added_tokens_decoder": {"1": {"content": "<x>", "special": False}, "2": {"content": "<y>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    table = read_tokens(tmp_path)
    assert table.ids == {"a": 0, "<x>": 1, "<y>": 2}
    assert table.flags["<x>"][0]


def test_of_two_tokens_with_one_id_the_added_one_counts(tmp_path: Path) -> None:
    content = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 1, "content": "<x>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert read_tokens(tmp_path).by_id() == {0: "a", 1: "<x>"}


@pytest.mark.parametrize(
    "content",
    [
        {"model": {}},
        {"model": {"vocab": [1]}},
        {"model": {"vocab": {"a": -1}}},
        {"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "<x>"}]},
    ],
)
def test_damage_is_named(tmp_path: Path, content: object) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"tokenizer\.json of .* is damaged"):
        read_tokens(tmp_path)


def test_damaged_settings_are_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"x": "y"}}))
    with pytest.raises(DataError, match=r"tokenizer_config\.json of .* is damaged"):
        read_tokens(tmp_path)
