# SPDX-License-Identifier: Apache-2.0
"""One tokenisation rule: the template's special tokens or the tokenizer's, never both."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from keelwright.core.errors import DataError
from keelwright.models.chat import encode, end_ids, render, template_digest

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]
MakeModel = Callable[..., PreTrainedModel]

BOS, END, USER, MODEL, SYSTEM = 1, 2, 4, 5, 6
WITH_BOS = "{{ bos_token }} {% for m in messages %}<user> {{ m['content'] }} {% endfor %}<model>"


def test_a_template_writes_the_roles_and_asks_for_an_answer(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    assert render(tokenizer, "the cat") == "<user> the cat <model>"
    assert render(tokenizer, "the cat", "old dog") == "<system> old dog <user> the cat <model>"
    ids = encode(tokenizer, render(tokenizer, "the cat", "old"))
    assert [ids[0], ids[2], ids[-1]] == [SYSTEM, USER, MODEL]


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_template_that_writes_bos_gets_one(make_tokenizer: MakeTokenizer, adds_bos: bool) -> None:
    tokenizer = make_tokenizer(template=WITH_BOS, adds_bos=adds_bos)
    ids = encode(tokenizer, render(tokenizer, "the cat"))
    assert ids[0] == BOS
    assert ids.count(BOS) == 1


def test_a_template_without_bos_gets_none(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(adds_bos=True)
    assert BOS not in encode(tokenizer, render(tokenizer, "the cat"))


def test_without_a_template_the_tokenizers_own_tokens_are_used(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(template=None, adds_bos=True)
    assert render(tokenizer, "the cat") == "the cat"
    assert render(tokenizer, "the cat", "old dog") == "old dog\n\nthe cat"
    assert encode(tokenizer, "the cat")[0] == BOS
    assert encode(tokenizer, "<bos> the cat").count(BOS) == 1
    assert encode(make_tokenizer(template=None), "the cat") == encode(tokenizer, "the cat")[1:]


def test_a_prompt_never_ends_in_an_end_token(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(template=None)
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <end>", special_tokens=[("<end>", END)])
    assert tokenizer("the cat")["input_ids"][-1] == END
    assert END not in encode(tokenizer, "the cat")


def test_a_template_that_refuses_a_system_message_says_so(make_tokenizer: MakeTokenizer) -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}<user>"
    with pytest.raises(DataError) as caught:
        render(make_tokenizer(template=strict), "the cat", "old dog")
    assert caught.value.problem == "The model's chat template refuses a request."
    assert caught.value.expected == "a template that takes a system message and a user message"
    assert caught.value.found == "no system role"
    assert "leave the system message out" in str(caught.value.fix)


def test_the_digest_follows_the_template(make_tokenizer: MakeTokenizer) -> None:
    assert template_digest(make_tokenizer()) == template_digest(make_tokenizer(adds_bos=True))
    assert template_digest(make_tokenizer()) != template_digest(make_tokenizer(template=WITH_BOS))
    assert template_digest(make_tokenizer(template=None)) == "none"


def test_every_end_token_is_found(make_tokenizer: MakeTokenizer, make_model: MakeModel) -> None:
    module, tokenizer = make_model(), make_tokenizer(template=None)
    assert end_ids(tokenizer, module) == [END]
    module.generation_config.eos_token_id = [7, 9]
    module.config.eos_token_id = 8
    assert end_ids(tokenizer, module) == [END, 7, 8, 9]
    module.generation_config.eos_token_id = module.config.eos_token_id = None
    tokenizer.eos_token = None
    assert end_ids(tokenizer, module) == []


def test_the_templates_own_end_of_turn_counts(make_tokenizer: MakeTokenizer, make_model: MakeModel) -> None:
    template = "{% for m in messages %}<user> {{ m['content'] }} <system> {% endfor %}<model>"
    assert end_ids(make_tokenizer(template=template), make_model()) == [END, SYSTEM]
    plain = "{% for m in messages %}<user> {{ m['content'] }} the cat {% endfor %}<model>"
    assert end_ids(make_tokenizer(template=plain), make_model()) == [END]
