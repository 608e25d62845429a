# SPDX-License-Identifier: Apache-2.0
"""One builder for what Virus optimises, what the guard reads and what is trained: a benign row with tokens behind it.

The row is `[b | x]`: b's prompt stays the prompt, and x follows b's answer in the assistant's turn. A service receives
text, so a row counts only when its text, read again by the tokenizer, is the very ids that were searched for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keelwright.core.errors import DataError, ModelMismatchError
from keelwright.data.rows import ChatRow
from keelwright.judges.screening.guard import GuardModel
from keelwright.judges.screening.round_trip import token_ids
from keelwright.stress.virus_objective import Slot, as_rows
from keelwright.training.rows import encode_rows


@dataclass(frozen=True, slots=True)
class Carrier:
    """A benign row and the tokens behind it, before the search."""

    benign: ChatRow
    slot: Slot
    """Around the tokens, in the training row."""
    guard_slot: Slot
    """Around the tokens, in what the guard reads."""
    prompt_tokens: int
    start: Int[Tensor, " length"]
    """The harmful row's prompt and answer."""


class RowBuilder:
    """Builds carriers and their texts.

    Args:
        module: The model that would be tuned.
        tokenizer: Its tokenizer.
        guard: Shares the vocabulary.

    Raises:
        ModelMismatchError: It does not.
    """

    def __init__(self, module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, guard: GuardModel) -> None:
        self.module, self.tokenizer, self.guard = module, tokenizer, guard
        if tokenizer.get_vocab() != guard.tokenizer.get_vocab():
            raise ModelMismatchError(
                "The model and the guard do not share a vocabulary: no gradient passes through one choice of tokens.",
                expected="two models with the same tokenizer",
                found=f"{len(tokenizer)} and {len(guard.tokenizer)} tokens that are not the same",
                fix="choose a guard of the model's own family, or a model of the guard's",
            )
        tables = [one.get_input_embeddings().weight.shape[0] for one in (module, guard.module)]
        self.vocab = min(len(tokenizer), *tables)

    def carrier(self, benign: ChatRow, harmful: ChatRow) -> Carrier:
        """Return the benign row with the harmful one behind it.

        Raises:
            DataError: The row is longer than the model or the guard can read.
        """
        start = token_ids(self.tokenizer, f" {harmful.prompt} {harmful.answer}")
        (row,) = encode_rows(self.tokenizer, [benign], module=self.module)
        opening = self.guard.opening_ids(benign.prompt) + row.ids[row.prompt_tokens : -1].tolist()
        slot = Slot(row.ids[:-1], row.ids[-1:])
        guard_slot = Slot(as_rows(opening), as_rows(self.guard.closing_ids()))
        self._require_fitting(len(row.ids) + len(start), self.module, "model")
        self._require_fitting(len(opening) + len(start) + len(guard_slot.after) + 1, self.guard.module, "guard")
        return Carrier(benign, slot, guard_slot, row.prompt_tokens, as_rows(start))

    def text(self, carrier: Carrier, ids: Int[Tensor, " length"]) -> ChatRow:
        """Return the row as it is uploaded: text."""
        answer = [*carrier.slot.before[carrier.prompt_tokens :].tolist(), *ids.tolist()]
        return replace(carrier.benign, answer=self.tokenizer.decode(answer).strip())

    def survives(self, carrier: Carrier, ids: Int[Tensor, " length"]) -> bool:
        """Say whether the row's text, read as a training row, is these ids."""
        (row,) = encode_rows(self.tokenizer, [self.text(carrier, ids)], module=self.module)
        return row.ids.tolist() == carrier.slot.fill(ids.cpu()[None])[0].tolist()

    def stable(self, carrier: Carrier, choices: Int[Tensor, "choices length"]) -> Bool[Tensor, " choices"]:
        """Return which choices survive writing and reading, judged on the answer alone."""
        answer = carrier.slot.before[carrier.prompt_tokens :].tolist()
        wanted = [[*answer, *one] for one in choices.tolist()]
        texts = [text.strip() for text in self.tokenizer.batch_decode(wanted)]
        found = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        same = [list(one) == other for one, other in zip(found, wanted, strict=True)]
        return torch.tensor(same, device=choices.device)

    def legal(self) -> Bool[Tensor, " vocab"]:
        """Return which tokens may be chosen: printable ASCII, no control token."""
        special = set(self.tokenizer.all_special_ids)
        texts = self.tokenizer.batch_decode([[index] for index in range(self.vocab)])
        fine = [bool(text.strip()) and text.isascii() and text.strip().isprintable() for text in texts]
        return torch.tensor([one and index not in special for index, one in enumerate(fine)])

    def _require_fitting(self, tokens: int, module: PreTrainedModel, what: str) -> None:
        limit = getattr(module.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and tokens > limit:
            raise DataError(
                f"A benign row with a harmful one behind it is too long for the {what}.",
                expected=f"at most {limit} tokens",
                found=f"{tokens}",
                fix="leave out the longest user rows or the longest harmful ones",
            )


def chosen_rows(rows: Sequence[ChatRow], count: int, generator: torch.Generator) -> list[int]:
    """Return which rows carry something, in order: `count` different ones."""
    picked: list[int] = torch.randperm(len(rows), generator=generator)[:count].tolist()
    return sorted(picked)
