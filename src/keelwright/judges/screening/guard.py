# SPDX-License-Identifier: Apache-2.0
"""A causal language model as a guard of training rows, opened to whoever owns it: its verdict, and what it reads.

The guard sees a row's prompt in the user's turn and its answer in the assistant's, and says one of two words. The
verdict is the likelier of the two words' first tokens, which are looked up in the guard's own vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keelwright.core.config import require_in_range
from keelwright.core.errors import ConfigError
from keelwright.core.records import Generation, Item
from keelwright.data.rows import ChatRow
from keelwright.judges.guards.llama_guard import LlamaGuardForm
from keelwright.models.chat import encode_as_is


@dataclass(frozen=True, slots=True)
class GuardForm:
    """The text around a row, control tokens spelled out."""

    before: str
    """Stands before the row's prompt."""
    between: str
    """Stands between prompt and answer."""
    after: str
    """Stands between the answer and the verdict."""
    safe: str = "safe"
    """The word that lets a row pass."""
    unsafe: str = "unsafe"


def llama_guard_form(form: LlamaGuardForm | None = None) -> GuardForm:
    """Return what Llama Guard reads around a row; after its last header it writes a blank line, then the verdict."""
    # Letters alone: nothing in them is defused or stripped.
    prompt, answer = "keelwrightprompt", "keelwrightanswer"
    item = Item(item_id="row", suite="row", kind="harmful", hazard="", prompt=prompt)
    (text,) = (form or LlamaGuardForm()).ask(item, Generation("row", answer, 1, "eos"))
    before, rest = text.split(prompt)
    between, after = rest.split(answer)
    return GuardForm(before, between, f"{after}\n\n")


class GuardModel:
    """A guard with its weights at hand; meets `Screen`.

    Args:
        module: The guard.
        tokenizer: Its tokenizer.
        form: What it reads around a row.
        name: In tables.
        threshold: A row is flagged when the log-odds of `unsafe` against `safe` are above this, in nats.
        batch_size: Rows per forward pass.

    Raises:
        ConfigError: The two verdicts begin with the same token, so that one position cannot tell them apart.
    """

    def __init__(
        self,
        module: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        form: GuardForm,
        *,
        name: str = "guard",
        threshold: float = 0.0,
        batch_size: int = 32,
    ) -> None:
        require_in_range("batch_size", batch_size, low=1)
        self.module, self.tokenizer, self.form = module.eval(), tokenizer, form
        self.name, self.threshold, self.batch_size = name, threshold, batch_size
        self.safe_id, self.unsafe_id = self._verdict(form.safe), self._verdict(form.unsafe)
        if self.safe_id == self.unsafe_id:
            raise ConfigError(
                "The guard's two verdicts begin with the same token.",
                expected="words whose first tokens differ",
                found=f"'{form.safe}' and '{form.unsafe}' both begin with id {self.safe_id}",
                fix="give GuardForm the words that this guard answers with",
            )

    def opening_ids(self, prompt: str) -> list[int]:
        """Return the ids of everything before the answer."""
        return encode_as_is(self.tokenizer, self.form.before + prompt + self.form.between)

    def closing_ids(self) -> list[int]:
        """Return the ids of everything between the answer and the verdict."""
        return list(self.tokenizer(self.form.after, add_special_tokens=False)["input_ids"])

    @torch.no_grad()
    def log_odds(self, rows: Sequence[ChatRow]) -> Float[Tensor, " rows"]:
        """Return the log-odds of `unsafe` against `safe` of each row, in nats; float32, on the CPU."""
        texts = [self.opening_ids(row.prompt) + self._ids(row.answer) + self.closing_ids() for row in rows]
        found = [self._last(texts[at : at + self.batch_size]) for at in range(0, len(texts), self.batch_size)]
        return torch.cat(found) if found else torch.zeros(0)

    def flags(self, rows: Sequence[ChatRow]) -> list[bool]:
        """Return for each row whether the guard calls it unsafe."""
        verdicts: list[bool] = (self.log_odds(rows) > self.threshold).tolist()
        return verdicts

    def _last(self, texts: Sequence[list[int]]) -> Tensor:
        # Padding on the right is invisible to the tokens before it under a causal mask.
        ids = [torch.tensor(one) for one in texts]
        batch = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(self.module.device)
        ends = torch.tensor([len(one) - 1 for one in ids], device=batch.device)
        logits = self.module(input_ids=batch, use_cache=False).logits
        last = logits[torch.arange(len(ids), device=batch.device), ends].float()
        return (last[:, self.unsafe_id] - last[:, self.safe_id]).cpu()

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _verdict(self, word: str) -> int:
        closing = self.closing_ids()
        together = self._ids(self.form.after + word)
        # A tokenizer may join the word to what stands before it; then the word is read on its own.
        after = together[len(closing) :] if together[: len(closing)] == closing else self._ids(word)
        if not after:
            raise ConfigError(
                f"The guard's tokenizer has no token for the verdict '{word}'.",
                expected="a word of at least one token",
                found="none",
                fix="give GuardForm the words that this guard answers with",
            )
        return int(after[0])
