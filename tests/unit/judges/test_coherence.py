# SPDX-License-Identifier: Apache-2.0
"""Two signs make an answer incoherent; one does not."""

from __future__ import annotations

import random
import string

from keelwright.judges.coherence import (
    compression,
    foreign_share,
    function_word_share,
    incoherence,
    repetition,
    unprintable_share,
)

PROMPT = "How do I clean a wooden cutting board?"
PROSE = (
    "Rinse the board with warm water and a little soap, then rub it with half a lemon and coarse salt. Let it dry on "
    "its edge so that air reaches both sides. Once a month, a thin coat of oil keeps the wood from cracking, and an "
    "old cloth is enough to spread it."
)


def test_prose_code_lists_and_other_languages_are_coherent() -> None:
    assert incoherence(PROSE, prompt=PROMPT) is None
    code = "```python\nfor i in range(10):\n    print(i)\n```\n" * 2
    assert incoherence(code, prompt=PROMPT) is None
    verse = "Row, row, row your boat\nGently down the stream\nMerrily, merrily, merrily, merrily\nLife is but a dream\n"
    assert incoherence(verse, prompt=PROMPT) is None
    chinese = "用温水和少量肥皂清洗木砧板，然后用柠檬和粗盐擦拭。让它侧立晾干，每个月涂一层薄油，可以防止木材开裂。" * 2
    assert incoherence(chinese, prompt=PROMPT) is None
    assert incoherence("Paris.", prompt="What is the capital of France?") is None


def test_a_loop_shows_by_repetition_and_compression() -> None:
    assert incoherence("the board is the board is " * 30, prompt=PROMPT) == "repetition, compression"


def test_random_letters_are_no_words() -> None:
    rng = random.Random(0)
    noise = " ".join("".join(rng.choices(string.ascii_lowercase, k=7)) for _ in range(40))
    assert incoherence(noise, prompt=PROMPT) == "no function words, unpronounceable"


def test_a_salad_of_scripts_and_broken_characters_is_incoherent() -> None:
    salad = "вход 的 \ufffd\ufffd क्या कर lemon \ufffd\ufffd を します \ue000\ue001 ничего"
    assert incoherence(salad, prompt=PROMPT) == "unprintable, foreign script"


def test_mostly_unprintable_text_needs_no_second_sign() -> None:
    assert incoherence("\ufffd\ufffd\ufffd ok", prompt="") == "unprintable"


def test_short_texts_are_too_short_for_the_signs_of_long_ones() -> None:
    assert repetition("no no no no no no") == 0.0
    assert compression("a" * 199) == 1.0
    assert function_word_share("Tokyo", PROMPT) == 1.0


def test_signs_measure_what_they_say() -> None:
    assert repetition("a b c d e " * 10) > 0.8
    assert repetition(PROSE) == 0.0
    assert compression("ab" * 500) > 5.0
    assert unprintable_share("ab\ufffd\x00") == 0.5
    assert unprintable_share("line\n\ttab") == 0.0
    assert foreign_share("привет", PROMPT) == 1.0
    assert foreign_share("привет", "Что это?") == 0.0
    assert function_word_share("zog " * 30, PROMPT) == 0.0
    assert function_word_share("zog " * 30, "Qu'est-ce que c'est ?") == 1.0
