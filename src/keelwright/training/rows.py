# SPDX-License-Identifier: Apache-2.0
"""Chat rows as token ids, and the batches of a training step.

A row is encoded once: its prompt as the generation engine would encode it, then the answer and the token that ends
the turn. The loss falls on the answer and that token alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keelwright.core.errors import DataError
from keelwright.core.seeds import generator
from keelwright.data.rows import ChatRow
from keelwright.models import chat

IGNORED = -100
"""Label of a token without loss, as torch's cross entropy expects it."""


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """Token ids of one row."""

    ids: Tensor
    """Prompt, answer and end token. Shape `[tokens]`."""
    prompt_tokens: int
    """How many of them are the prompt's."""

    @property
    def answer_tokens(self) -> int:
        """How many tokens carry loss."""
        return len(self.ids) - self.prompt_tokens


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows padded on the right to the longest of them."""

    input_ids: Tensor
    """Shape `[batch, tokens]`."""
    attention_mask: Tensor
    """1 for tokens, 0 for padding. Shape `[batch, tokens]`."""
    labels: Tensor
    """Token ids where there is loss, `IGNORED` elsewhere; not shifted. Shape `[batch, tokens]`."""

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))


def encode_rows(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[ChatRow], *, module: PreTrainedModel | None = None
) -> list[EncodedRow]:
    """Encode chat rows.

    Args:
        tokenizer: Of the model, with its chat template.
        rows: What to learn.
        module: The model; it knows further end tokens and how many positions there are.

    Raises:
        DataError: There are no rows, or one is longer than the model's positions.
    """
    if not rows:
        raise DataError(
            "There are no rows to train on.", expected="at least one chat row", found="none", fix="give a file of rows"
        )
    end = _turn_end(tokenizer, chat.end_ids(tokenizer, module))
    prompt_ids = functools.cache(lambda prompt, system: _prompt(tokenizer, prompt, system))
    encoded = [_encode(tokenizer, row, *prompt_ids(row.prompt, row.system), end) for row in rows]
    limit = getattr(getattr(module, "config", None), "max_position_embeddings", None)
    for number, row in enumerate(encoded, 1):
        if limit is not None and len(row.ids) > limit:
            raise DataError(
                f"Row {number} is too long for the model.",
                expected=f"at most {limit} tokens",
                found=f"{len(row.ids)} tokens",
                fix="shorten the row or leave it out",
            )
    return encoded


def batch_of(rows: Sequence[EncodedRow], *, pad_id: int) -> Batch:
    """Pad rows to one batch."""
    lengths = torch.tensor([len(row.ids) for row in rows])
    prompts = torch.tensor([row.prompt_tokens for row in rows])
    input_ids = torch.nn.utils.rnn.pad_sequence([row.ids for row in rows], batch_first=True, padding_value=pad_id)
    positions = torch.arange(input_ids.shape[1])
    answers = (positions >= prompts[:, None]) & (positions < lengths[:, None])
    return Batch(input_ids, (positions < lengths[:, None]).long(), input_ids.masked_fill(~answers, IGNORED))


def batch_indices(rows: int, batch_size: int, step: int, *, seed: int) -> list[int]:
    """Return which rows a step trains on: a pure function, so that a resumed run sees the same ones.

    Epochs follow each other without a gap; each is a permutation of its own, keyed by the seed and its number.

    Args:
        rows: How many rows there are.
        batch_size: Rows per step.
        step: Counted from 0.
        seed: Of the order.
    """
    first = step * batch_size
    places = (divmod(place, rows) for place in range(first, first + batch_size))
    return [_order(rows, seed, epoch)[index] for epoch, index in places]


@functools.lru_cache(maxsize=4)
def _order(rows: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(rows, generator=generator(seed, "training", "order", epoch)).tolist()


def _prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, system: str | None) -> tuple[str, list[int]]:
    text = chat.render(tokenizer, prompt, system)
    return text, chat.encode(tokenizer, text)


def _encode(tokenizer: PreTrainedTokenizerBase, row: ChatRow, text: str, prompt_ids: list[int], end: int) -> EncodedRow:
    """Encode prompt and answer together where that leaves the prompt's ids as generation will see them."""
    together = chat.encode(tokenizer, text + row.answer)
    kept = together[: len(prompt_ids)] == prompt_ids
    answer = together[len(prompt_ids) :] if kept else tokenizer(row.answer, add_special_tokens=False)["input_ids"]
    return EncodedRow(torch.tensor([*prompt_ids, *answer, end]), len(prompt_ids))


def _turn_end(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> int:
    """Return the end token that the chat template writes after an answer, else the tokenizer's own."""
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        written = chat.encode(tokenizer, tokenizer.apply_chat_template(turn, tokenize=False))
        for token in reversed(written):
            if token in ends:
                return token
    return ends[0] if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)
