# SPDX-License-Identifier: Apache-2.0
"""From a prompt to token ids, by one rule.

A tokenizer with a chat template gets the template's text, encoded without further special tokens, because the template
writes them itself. One without gets the plain prompt and its own special tokens. Either way a text begins with one BOS
at most, and never ends in an end token, after which there would be nothing to say.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jinja2

from keelwright.core.digests import json_digest
from keelwright.core.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PROBE = "answer"


def render(tokenizer: PreTrainedTokenizerBase, prompt: str, system: str | None = None) -> str:
    """Return the text that asks the model for an answer to `prompt`.

    Args:
        tokenizer: Its chat template is used where it has one.
        prompt: The user's words.
        system: The system message, if any.

    Raises:
        DataError: The chat template refuses the messages, for example a system message.
    """
    if not tokenizer.chat_template:
        return prompt if system is None else f"{system}\n\n{prompt}"
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except jinja2.TemplateError as error:
        raise DataError(
            "The model's chat template refuses a request.",
            expected="a template that takes " + " and ".join(f"a {one['role']} message" for one in messages),
            found=str(error),
            fix="leave the system message out, or give the model another chat template",
        ) from error


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a rendered text.

    Args:
        tokenizer: The model's tokenizer.
        text: What `render` returned, or any part of it.
    """
    special = not tokenizer.chat_template
    ids: list[int] = list(tokenizer(text, add_special_tokens=special, truncation=False)["input_ids"])
    if special:
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        while len(ids) > 1 and bos is not None and ids[0] == ids[1] == bos:
            del ids[0]
        if len(ids) > 1 and eos is not None and ids[-1] == eos:
            del ids[-1]
    return ids


def encode_as_is(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a text that is complete as it stands: special tokens that it spells out are read as such.

    One BOS comes first where the tokenizer writes one and the text does not.
    """
    plain: list[int] = list(tokenizer(text, add_special_tokens=False, truncation=False)["input_ids"])
    bos = tokenizer.bos_token_id
    opens = bos is not None and list(tokenizer("text")["input_ids"])[:1] == [bos]
    return [bos, *plain] if opens and plain[:1] != [bos] else plain


def template_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the digest of the chat template; `none` where there is none."""
    return json_digest(tokenizer.chat_template) if tokenizer.chat_template else "none"


def end_ids(tokenizer: PreTrainedTokenizerBase, module: PreTrainedModel | None) -> list[int]:
    """Return every token that ends an answer, sorted; without a model those that the tokenizer knows.

    Those of the generation settings, of the model's settings, of the tokenizer, and the special token that the chat
    template writes after an answer: fine-tuned models often lose the first of these.
    """
    found: set[int] = set()
    known = () if module is None else (module.generation_config, module.config, module.config.get_text_config())
    for settings in known:
        ids = getattr(settings, "eos_token_id", None)
        found.update(ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids])
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    found.update(_turn_end(tokenizer))
    return sorted(found)


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special token right after an answer in a rendered conversation, if there is one."""
    if not tokenizer.chat_template:
        return []
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _PROBE}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except jinja2.TemplateError:
        return []
    _, found, rest = text.rpartition(_PROBE)
    ids = list(tokenizer(rest, add_special_tokens=False)["input_ids"]) if found and rest else []
    return ids[:1] if ids and ids[0] in tokenizer.all_special_ids else []
