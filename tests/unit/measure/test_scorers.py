# SPDX-License-Identifier: Apache-2.0
"""Scorers on the ways in which models write a right answer, and on near misses."""

from __future__ import annotations

import pytest

from keelwright.core.errors import ConfigError, DataError
from keelwright.core.records import Generation, Item
from keelwright.measure.scorers import (
    TaskJudge,
    chosen_letter,
    last_number,
    score_choice,
    score_exact,
    score_number,
    score_regex,
)

CAPITALS = "What is the capital of France?\nA) Rome\nB) Paris\nC) Berlin"


@pytest.mark.parametrize("answer", ["bright", "Bright.", " **bright** ", '"bright"', "BRIGHT\n", "Assistant: bright"])
def test_exact_forgives_case_marks_and_spacing(answer: str) -> None:
    assert score_exact(answer, "bright")


@pytest.mark.parametrize("answer", ["dark", "bright mood", "brights", "", "br ight"])
def test_exact_forgives_nothing_else(answer: str) -> None:
    assert not score_exact(answer, "bright")


def test_exact_keeps_marks_inside_the_answer() -> None:
    assert not score_exact("C", "C++")
    assert not score_exact("35", "3.5")
    assert not score_exact("a", "the")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("So the total is $1,234.50.", 1234.5),
        ("x = -3", -3.0),
        ("3 apples and 4 pears", 4.0),
        ("12, 13", 13.0),
        ("about 1e-3", 0.001),
        ("42%", 42.0),
        ("5 - 3 = 2", 2.0),
        ("version v2.0", None),
        ("none", None),
    ],
)
def test_the_last_number_is_read_with_its_sign_and_separators(text: str, number: float | None) -> None:
    assert last_number(text) == number


def test_numbers_match_within_a_tolerance() -> None:
    assert score_number("The answer is 0.30000000001", "0.3")
    assert score_number("1,000", "1000.0")
    assert not score_number("0.31", "0.3")
    assert not score_number("no idea", "0.3")


def test_regex_searches_anywhere_and_over_lines() -> None:
    assert score_regex("def add(a, b):\n    return a + b", r"def add\(.*return a \+ b")
    assert not score_regex("def sub(a, b): ...", r"def add")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "b"),
        ("(B) Paris", "b"),
        ("B) Paris", "b"),
        ("b.", "b"),
        ("The answer is B.", "b"),
        ("The correct option is (b), because Paris is the capital.", "b"),
        ("First I thought of A. The answer is B", "b"),
        ("Answer: A", "a"),
        ("**B**", "b"),
        ("It can only be (C).", "c"),
        ("either (A) or (B)", None),
        ("A cat sat there", None),
        ("I'm not sure", None),
        ("The answer is a bit unclear", None),
        ("Paris", None),
    ],
)
def test_the_letter_is_found_where_it_is_a_choice(answer: str, letter: str | None) -> None:
    assert chosen_letter(answer) == letter


def test_the_text_of_an_option_counts_as_its_letter() -> None:
    assert score_choice("Paris.", "B", prompt=CAPITALS)
    assert score_choice("paris", "(b)", prompt=CAPITALS)
    assert not score_choice("Rome", "B", prompt=CAPITALS)
    assert not score_choice("Paris or Rome", "B", prompt=CAPITALS)


def _judged(output: str, *, expected: str | None, scorer: str | None, finish: str = "eos") -> tuple[str, float | None]:
    item = Item("t", "task:x", "task", "x", CAPITALS, expected=expected, scorer=scorer)
    judgement = TaskJudge().judge(item, Generation("t", output, 1, finish))
    return judgement.label, judgement.score


def test_the_judge_uses_the_items_scorer() -> None:
    assert _judged("Paris", expected="B", scorer="choice") == ("correct", 1.0)
    assert _judged("it is 5", expected="5", scorer="number") == ("correct", 1.0)
    assert _judged("it is 5", expected="5", scorer=None) == ("wrong", 0.0)
    assert _judged("it is 5", expected=r"\d", scorer="regex") == ("correct", 1.0)
    assert _judged("", expected="5", scorer="number", finish="error") == ("error", None)


def test_an_item_without_an_answer_or_with_an_unknown_scorer_is_refused() -> None:
    with pytest.raises(DataError, match="has no known answer"):
        _judged("5", expected=None, scorer="exact")
    with pytest.raises(ConfigError, match="'scorer' is not a known choice") as caught:
        _judged("5", expected="5", scorer="numbers")
    assert caught.value.fix == "did you mean 'number'?"
