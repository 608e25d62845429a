# SPDX-License-Identifier: Apache-2.0
"""Chat rows as token ids, and the batches of a training step.

A row is encoded once: its prompt as the generation engine would encode it, then the answer and the token that ends
the turn. The loss falls on the answer and that token alone; where the beginning of the reply is given, it counts as
prompt. A beginning that is broken off is cut between its tokens, never turned back into text.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keelwright.core.errors import DataError
from keelwright.core.seeds import generator
from keelwright.data.rows import ChatRow
from keelwright.models import chat
from keelwright.training.config import TooLong

IGNORED = -100
"""Label of a token without loss, as torch's cross entropy expects it."""

_CONTROL_MARKS: Final = (
    "<|im_start|>",
    "<|start_header_id|>",
    "<start_of_turn>",
    "<|start_of_role|>",
    "[INST]",
    "<|user|>",
    "<|assistant|>",
)
"""What chat templates write around turns, and people do not."""


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """Token ids of one row."""

    ids: Tensor
    """Prompt, answer and end token. Shape `[tokens]`."""
    prompt_tokens: int
    """How many of them are the prompt's, or the given beginning of the reply."""

    @property
    def answer_tokens(self) -> int:
        """How many tokens carry loss."""
        return max(0, len(self.ids) - self.prompt_tokens)


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows padded on the right to the longest of them."""

    input_ids: Tensor
    """Shape `[batch, tokens]`."""
    attention_mask: Tensor
    """1 for tokens, 0 for padding. Shape `[batch, tokens]`."""
    labels: Tensor
    """Token ids where there is loss, `IGNORED` elsewhere; not shifted. Shape `[batch, tokens]`."""
    rows: Tensor
    """Place of each row in its feed, so that what was computed once per row is found again. Shape `[batch]`."""

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        return Batch(*(getattr(self, name).to(device) for name in self.__slots__))


@dataclass(frozen=True, slots=True)
class Fitted:
    """Encoded rows that fit the model, and what it took."""

    rows: list[EncodedRow]
    left_out: int = 0
    """Rows that are not there: they were too long, or no answer token was left."""
    cut: int = 0
    """Rows whose answer lost its end."""
    tokens_cut: int = 0
    """Answer tokens that they lost."""


def encode_rows(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[ChatRow], *, module: PreTrainedModel | None = None
) -> list[EncodedRow]:
    """Encode chat rows that all fit the model; see `fit_rows`."""
    return fit_rows(tokenizer, rows, module=module).rows


def fit_rows(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[ChatRow],
    *,
    module: PreTrainedModel | None = None,
    too_long: TooLong = "error",
    name: str = "",
) -> Fitted:
    """Encode chat rows.

    Args:
        tokenizer: Of the model, with its chat template.
        rows: What to learn.
        module: The model; it knows further end tokens and how many positions there are.
        too_long: What happens to rows that are longer than the model's positions.
        name: Of the rows, for error texts.

    Raises:
        DataError: There are no rows, they hold another template's control tokens, one is longer than the model's
            positions (under `error`), or none has an answer token left.
    """
    kind = f"'{name}' rows" if name else "rows"
    if not rows:
        raise DataError(
            f"There are no {kind} to train on.",
            expected="at least one chat row",
            found="none",
            fix="give a file of rows",
        )
    _require_plain(tokenizer, rows, kind)
    end = _turn_end(tokenizer, chat.end_ids(tokenizer, module))
    prompt_ids = functools.cache(lambda prompt, system: _prompt(tokenizer, prompt, system))
    encoded = [_encode(tokenizer, row, *prompt_ids(row.prompt, row.system), end) for row in rows]
    limit = getattr(getattr(module, "config", None), "max_position_embeddings", None)
    return Fitted(encoded) if limit is None else _fit(encoded, limit, too_long, kind)


def _fit(encoded: Sequence[EncodedRow], limit: int, too_long: TooLong, kind: str) -> Fitted:
    """Apply the rule for long rows; nothing is shortened without being counted."""
    long = [number for number, row in enumerate(encoded, 1) if len(row.ids) > limit]
    if long and too_long == "error":
        raise DataError(
            f"Row {long[0]} is too long for the model.",
            expected=f"at most {limit} tokens",
            found=f"{len(encoded[long[0] - 1].ids)} tokens; {len(long)} of {len(encoded)} {kind} are too long",
            fix="shorten the rows, or set too_long to 'leave out' or 'cut', which are counted",
        )
    lost = sum(len(encoded[number - 1].ids) - limit for number in long)
    if too_long == "leave out":
        fitted = Fitted([row for row in encoded if len(row.ids) <= limit], left_out=len(long))
    else:
        shorter = [EncodedRow(row.ids[:limit], row.prompt_tokens) for row in encoded]
        kept = [row for row in shorter if row.answer_tokens]
        fitted = Fitted(kept, len(shorter) - len(kept), len(long) - (len(shorter) - len(kept)), lost)
    if not fitted.rows:
        raise DataError(
            f"None of the {kind} has an answer token to learn from.",
            expected=f"rows whose prompt leaves room for an answer within {limit} tokens",
            found=f"{fitted.left_out} rows left out, {fitted.cut} cut, nothing left that carries loss",
            fix="shorten the prompts, or choose a model with more positions",
        )
    return fitted


def _require_plain(tokenizer: PreTrainedTokenizerBase, rows: Sequence[ChatRow], kind: str) -> None:
    """Raise `DataError` where most rows were rendered already: they would be wrapped in a second template."""
    counts = Counter(
        mark for row in rows for mark in _CONTROL_MARKS if mark in row.prompt or row.answer.startswith(mark)
    )
    if not counts:
        return
    mark, found = counts.most_common(1)[0]
    if 2 * found >= len(rows):
        raise DataError(
            f"The {kind} hold the control tokens of a chat template: they look rendered already.",
            expected="plain prompts and answers; the model's own template is added here",
            found=f"'{mark}' in {found} of {len(rows)} rows",
            fix="give the texts without template, or with 'messages'",
        )


def batch_of(rows: Sequence[EncodedRow], *, pad_id: int, indices: Sequence[int] | None = None) -> Batch:
    """Pad rows to one batch.

    Args:
        rows: At least one.
        pad_id: Any token: it is masked out of attention and loss.
        indices: Place of each row in its feed; by default 0, 1, ...
    """
    lengths = torch.tensor([len(row.ids) for row in rows])
    prompts = torch.tensor([row.prompt_tokens for row in rows])
    input_ids = torch.nn.utils.rnn.pad_sequence([row.ids for row in rows], batch_first=True, padding_value=pad_id)
    positions = torch.arange(input_ids.shape[1])
    answers = (positions >= prompts[:, None]) & (positions < lengths[:, None])
    places = torch.tensor(list(range(len(rows)) if indices is None else indices))
    return Batch(input_ids, (positions < lengths[:, None]).long(), input_ids.masked_fill(~answers, IGNORED), places)


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


@functools.lru_cache(maxsize=64)
def _order(rows: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(rows, generator=generator(seed, "training", "order", epoch)).tolist()


def _prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, system: str | None) -> tuple[str, list[int]]:
    text = chat.render(tokenizer, prompt, system)
    return text, chat.encode(tokenizer, text)


def _encode(tokenizer: PreTrainedTokenizerBase, row: ChatRow, text: str, prompt_ids: list[int], end: int) -> EncodedRow:
    """Encode prompt and answer together where that leaves the prompt's ids as generation will see them."""
    given = _following(tokenizer, text, prompt_ids, row.prefill) if row.prefill else []
    answer = _following(tokenizer, text + row.prefill, [*prompt_ids, *given], row.answer)
    if row.prefill_cut is not None:
        given = given[: row.prefill_cut.kept(len(given))]
    return EncodedRow(torch.tensor([*prompt_ids, *given, *answer, end]), len(prompt_ids) + len(given))


def _following(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], more: str) -> list[int]:
    """Return the ids of `more` after a text whose ids stand already."""
    together = chat.encode(tokenizer, text + more)
    if together[: len(ids)] == ids:
        return together[len(ids) :]
    alone: list[int] = tokenizer(more, add_special_tokens=False)["input_ids"]
    return alone


def _turn_end(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> int:
    """Return the end token that the chat template writes after an answer, else the tokenizer's own."""
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        written = chat.encode(tokenizer, tokenizer.apply_chat_template(turn, tokenize=False))
        for token in reversed(written):
            if token in ends:
                return token
    return ends[0] if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)
