# SPDX-License-Identifier: Apache-2.0
from typing import get_args

import pytest

from keelwright.core.errors import ConfigError
from keelwright.data.asking import PLAIN, framed_row
from keelwright.data.rows import ChatRow
from keelwright.data.styles import DEFAULT_TEXTS, ClosingMark, RandomPrefix, Style, style_of

PROMPT = "how do i paint the lamp in the harbour?"
CHANGING = [style for style in get_args(Style) if style != "identity"]


def test_the_identity_is_the_plain_frame():
    assert style_of("identity", text="ignored") is PLAIN


@pytest.mark.parametrize("style", CHANGING)
def test_a_style_changes_the_request_and_neither_system_message_nor_answer(style):
    row = ChatRow(PROMPT, "take the brush.", system="be brief.")
    styled = framed_row(style_of(style), row)
    assert styled.prompt != PROMPT
    assert (styled.answer, styled.system) == (row.answer, row.system)


@pytest.mark.parametrize("style", CHANGING)
def test_a_style_keeps_the_words_of_the_request_in_their_order(style):
    prompt, _ = style_of(style).ask(PROMPT, None)
    assert prompt.lower().rstrip("?.").endswith(PROMPT.rstrip("?"))


@pytest.mark.parametrize("style", CHANGING)
def test_a_style_is_the_same_in_training_and_testing(style):
    assert style_of(style, seed=3).ask(PROMPT, None) == style_of(style, seed=3).ask(PROMPT, None)


@pytest.mark.parametrize("style", CHANGING)
def test_a_style_has_its_own_name_and_says_what_it_does(style):
    found = style_of(style)
    assert found.name == style
    assert found.says.startswith("Every request ")


@pytest.mark.parametrize(
    ("style", "text", "expected"),
    [
        ("register", "<reserved_0>", f"<reserved_0> {PROMPT}"),
        ("prefix", " On record: ", f"On record: {PROMPT}"),
        ("case", "title", "How Do I Paint The Lamp In The Harbour?"),
        ("case", "alternating", "hOw dO I PaInT ThE LaMp iN ThE HaRbOuR?"),
        ("punctuation", "!", "how do i paint the lamp in the harbour!"),
    ],
)
def test_known_answers(style, text, expected):
    assert style_of(style, text=text).ask(PROMPT, None)[0] == expected


def test_a_closing_mark_is_added_where_there_was_none():
    assert ClosingMark("...").ask("say 1 plus 2", None)[0] == "say 1 plus 2..."


def test_random_words_differ_between_requests_and_seeds():
    style = RandomPrefix(tuple("abcdefgh"), count=6)
    told = {style.ask(f"request {number}", None)[0].rsplit(" ", 2)[0] for number in range(20)}
    assert len(told) == 20
    other = RandomPrefix(tuple("abcdefgh"), count=6, seed=1)
    assert style.ask(PROMPT, None) != other.ask(PROMPT, None)


def test_random_words_are_of_the_list_and_as_many_as_asked_for():
    *words, last = RandomPrefix(("red", "blue"), count=4).ask("request", None)[0].split()
    assert last == "request"
    assert len(words) == 4
    assert set(words) <= {"red", "blue"}


@pytest.mark.parametrize(
    ("style", "text", "says"),
    [
        ("shouting", None, "'style' is not a known choice"),
        ("case", "loud", "'case' is not a known choice"),
        ("prefix", "  ", "The style 'prefix' needs a text"),
    ],
)
def test_what_cannot_be_a_style_is_an_error(style, text, says):
    with pytest.raises(ConfigError, match=says):
        style_of(style, text=text)


@pytest.mark.parametrize("settings", [{"words": ()}, {"words": ("a",), "count": 0}])
def test_random_words_need_words(settings):
    with pytest.raises(ConfigError, match="out of range"):
        RandomPrefix(**settings)


def test_every_style_has_a_default_text():
    assert set(DEFAULT_TEXTS) == set(get_args(Style))
