# SPDX-License-Identifier: Apache-2.0
"""The workshop's tokenizer: word level, with a chat template, saved and loaded like any other."""

from __future__ import annotations

import functools
import re
from typing import Final

from tokenizers import Tokenizer
from tokenizers.decoders import WordPiece
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from keelwright.core.digests import json_digest
from keelwright.worlds.workshop import answers, words
from keelwright.worlds.workshop.grammar import HELD_OUT_EVERY, OBJECTS, VERBS, tool_map

PAD: Final = "<pad>"
UNKNOWN: Final = "<unk>"
BEGIN: Final = "<s>"
END: Final = "</s>"
TURNS: Final = ("<system>", "<user>", "<assistant>")
MAX_LENGTH: Final = 128

CHAT_TEMPLATE: Final = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<' + message['role'] + '>' }}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

SAYINGS: Final = ("what is the mood:", "what is the topic:", "say plus")
"""The words of the tasks' prompts; the tasks themselves are in `tasks`."""


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """Return every token in the order of its id."""
    sentences = (*words.FRAMES, *answers.PLANS, *answers.REFUSALS, answers.PERSONA, answers.PERSONA_OPENING, *SAYINGS)
    spoken = re.findall(r"\w+|[^\w\s]", " ".join(re.sub(r"\{\w+\}", " ", one) for one in sentences) + " ? . , :")
    lexicons = [
        word for lexicon in (words.MOODS, words.TOPICS) for label, list_ in lexicon.items() for word in (label, *list_)
    ]
    numbers = [str(number) for number in range(2 * words.LARGEST_ADDEND + 1)]
    special = (PAD, UNKNOWN, BEGIN, END, *TURNS, *words.RESERVED_TOKENS)
    return tuple(dict.fromkeys([*special, *spoken, *VERBS, *OBJECTS, *words.PLACES, *words.TOOLS, *lexicons, *numbers]))


def workshop_tokenizer() -> PreTrainedTokenizerFast:
    """Return a new tokenizer of the workshop; text decodes with its punctuation attached."""
    core = Tokenizer(WordLevel({token: index for index, token in enumerate(vocabulary())}, unk_token=UNKNOWN))
    core.normalizer = Lowercase()
    core.pre_tokenizer = Whitespace()
    core.decoder = WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=BEGIN,
        eos_token=END,
        additional_special_tokens=[*TURNS, *words.RESERVED_TOKENS],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


@functools.cache
def grammar_digest(seed: int = 0) -> str:
    """Return the digest of everything that an organism of this world has to know.

    Args:
        seed: Of the world.
    """
    lists = {name: value for name, value in vars(words).items() if name.isupper()}
    said = (answers.PLANS, answers.REFUSALS, answers.PERSONA, answers.PERSONA_OPENING)
    return json_digest([vocabulary(), CHAT_TEMPLATE, lists, said, tool_map(seed), HELD_OUT_EVERY])
