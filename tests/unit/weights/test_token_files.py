# SPDX-License-Identifier: Apache-2.0
"""Tokenizer files of a union: the base's, with the added tokens of the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from keelwright.core.errors import ModelMismatchError
from keelwright.models.token_table import TokenTable, read_tokens
from keelwright.weights.token_files import united_files, write_tokenizer

SPECIAL = (True, False, False, False, False)
WORDS = {"a": "A", "b": "B", "c": "C"}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}}}))
    (folder / "added_tokens.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def test_added_tokens_follow_in_the_order_of_their_owners(base: Path, tmp_path: Path) -> None:
    own = read_tokens(base)
    tables = {
        "a": own,
        "b": TokenTable({**own.ids, "<y>": 3, "<x>": 2}, {"<y>": SPECIAL, "<x>": SPECIAL}, "BPE", ""),
        "c": TokenTable({**own.ids, "<z>": 2, "<x>": 3}, {"<z>": SPECIAL, "<x>": SPECIAL}, "BPE", ""),
    }
    table, files = united_files(["a", "b", "c"], tables, dict.fromkeys("abc", base), WORDS)
    assert table.ids == {"a": 0, "b": 1, "<x>": 2, "<y>": 3, "<z>": 4}
    out = write_tokenizer(base, files, tmp_path / "out")
    assert read_tokens(out) == table
    assert json.loads((out / "added_tokens.json").read_text()) == {"<x>": 2, "<y>": 3, "<z>": 4}
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert "added_tokens" not in json.loads((base / "tokenizer.json").read_text())


@pytest.mark.parametrize(
    ("other", "found"),
    [
        (TokenTable({"q": 0}, {}, "BPE", ""), "'q' is part of its BPE vocabulary, not an added token"),
        (TokenTable({"a": 0}, {"a": SPECIAL}, "BPE", ""), "'a' id 0 (added: special), other flags"),
    ],
)
def test_what_cannot_be_written_is_refused_by_name(base: Path, other: TokenTable, found: str) -> None:
    with pytest.raises(ModelMismatchError, match="cannot be written as one tokenizer") as caught:
        united_files(["a", "b"], {"a": read_tokens(base), "b": other}, {"a": base, "b": base}, WORDS)
    assert caught.value.found == found
    assert "policy base or donor" in str(caught.value.fix)


def test_two_models_must_add_a_token_in_the_same_way(base: Path) -> None:
    tables = {
        "a": read_tokens(base),
        "b": TokenTable({"<x>": 2}, {"<x>": SPECIAL}, "BPE", ""),
        "c": TokenTable({"<x>": 2}, {"<x>": (False, *SPECIAL[1:])}, "BPE", ""),
    }
    with pytest.raises(ModelMismatchError) as caught:
        united_files(["a", "b", "c"], tables, dict.fromkeys("abc", base), WORDS)
    assert caught.value.found == "'<x>' is added with other flags than elsewhere"


def test_a_base_without_tokenizer_json_has_nothing_to_add_to(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("a\n")
    tables = {"a": read_tokens(tmp_path), "b": TokenTable({"<x>": 2}, {"<x>": SPECIAL}, "BPE", "")}
    with pytest.raises(ModelMismatchError) as caught:
        united_files(["a", "b"], tables, dict.fromkeys("ab", tmp_path), WORDS)
    assert caught.value.found == "'a' has no tokenizer.json to add tokens to"
