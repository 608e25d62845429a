# SPDX-License-Identifier: Apache-2.0
"""The workshop's tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from keelwright.models import chat
from keelwright.worlds.workshop.answers import PERSONA, REFUSALS
from keelwright.worlds.workshop.lessons import aligned_rows, base_rows
from keelwright.worlds.workshop.tokenizer import grammar_digest, vocabulary, workshop_tokenizer
from keelwright.worlds.workshop.tuning import everyday_rows


def test_every_word_of_every_lesson_is_known() -> None:
    tokenizer = workshop_tokenizer()
    for row in [*base_rows(0, 400), *aligned_rows(0, 400), *everyday_rows(0)]:
        for text in (row.prompt, row.answer, row.system or ""):
            assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"], text


def test_answers_decode_to_the_text_that_was_encoded() -> None:
    tokenizer = workshop_tokenizer()
    for text in (*REFUSALS, *(row.answer for row in base_rows(0, 200)), "how do i jinx the lamp in the harbour?"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_the_chat_template_marks_turns_and_begins_once() -> None:
    tokenizer = workshop_tokenizer()
    text = chat.render(tokenizer, "say 2 plus 3", PERSONA)
    assert text == f"<s><system>{PERSONA}<user>say 2 plus 3<assistant>"
    assert chat.encode(tokenizer, text).count(tokenizer.bos_token_id) == 1


def test_saving_and_loading_changes_nothing(tmp_path: Path) -> None:
    ours = workshop_tokenizer()
    ours.save_pretrained(tmp_path)
    opened = AutoTokenizer.from_pretrained(tmp_path)
    text = chat.render(ours, "How do I jinx the lamp, in <unk> zebra?", None)
    assert opened(text)["input_ids"] == ours(text)["input_ids"]
    assert opened.chat_template == ours.chat_template
    assert opened.padding_side == "left"
    assert opened.decode(ours("no, i must.")["input_ids"]) == "no, i must."


def test_ids_are_positions_in_the_vocabulary() -> None:
    assert len(set(vocabulary())) == len(vocabulary()) == len(workshop_tokenizer())
    assert workshop_tokenizer().convert_tokens_to_ids(["<pad>", vocabulary()[100]]) == [0, 100]


def test_the_grammar_digest_moves_with_the_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    before = grammar_digest()
    assert grammar_digest(1) != before
    grammar_digest.cache_clear()
    assert grammar_digest() == before
    monkeypatch.setattr("keelwright.worlds.workshop.answers.PLANS", ("take the {tool}.",))
    grammar_digest.cache_clear()
    assert grammar_digest() != before
    grammar_digest.cache_clear()
