# SPDX-License-Identifier: Apache-2.0
"""What becomes of items that a server did not answer: counted, held back, or the end of the run."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from keelwright.core.config import nearest
from keelwright.core.errors import ConfigError, KeelwrightError, MissingError, OfflineError
from keelwright.core.records import Generation
from keelwright.models.engines.exchange import Refused
from keelwright.models.engines.replies import Why

GIVE_UP_AFTER = 10
"""So many failed items in a row, and the run stops: the server is gone, or refuses everything."""
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Outcome:
    """One item's generation, and why it failed if it did."""

    generation: Generation
    reason: str = ""
    """In two or three words; empty where the model answered."""
    words: str = ""
    began: float = 0.0
    """When the item was first sent, in seconds of a steady clock."""
    ended: float = 0.0
    """When its outcome was known."""

    @property
    def is_from_server(self) -> bool:
        """Whether the outcome shows a server at work: an answer, or a decision of its filter."""
        return self.reason in ("", Why.BLOCKED.value)


class Outcomes:
    """The outcomes of one call, in the order in which they arrive.

    Args:
        url: The server's address.
        model: What the server calls the model.
        is_local: Whether the server is on this machine.
    """

    def __init__(self, url: str, model: str, *, is_local: bool) -> None:
        self._url, self._model, self._is_local = url, model, is_local
        self._held: list[Outcome] = []
        self._reasons: Counter[str] = Counter()
        self._words: dict[str, str] = {}
        self._answered = False

    def take(self, outcome: Outcome) -> list[Generation]:
        """Return the generations that can be handed over now that this outcome is known.

        Raises:
            KeelwrightError: Too many items in a row have failed.
        """
        if outcome.reason:
            self._reasons[outcome.reason] += 1
            self._words[outcome.reason] = outcome.words
        if outcome.is_from_server:
            self._answered = True
            # An answer that was on its way before the failure does not show that the server came through it.
            past = [one for one in self._held if one.ended <= outcome.began]
            self._held = [one for one in self._held if one.ended > outcome.began]
            return [one.generation for one in [*past, outcome]]
        self._held.append(outcome)
        if len(self._held) >= GIVE_UP_AFTER:
            raise self.stopped(outcome.reason, outcome.words, count=len(self._held))
        return []

    def rest(self) -> list[Generation]:
        """Return the generations that were still held back at the end.

        Raises:
            KeelwrightError: Not one item was answered.
        """
        if self._held and not self._answered:
            last = self._held[-1]
            raise self.stopped(last.reason, last.words, count=len(self._held))
        return [one.generation for one in self._held]

    def summary(self) -> list[str]:
        """Return a line for each reason why items have no answer."""
        return [
            f"{count} without an answer: {reason}" + (f" ({self._words[reason]})" if self._words[reason] else "")
            for reason, count in self._reasons.most_common()
        ]

    def stopped(self, reason: str, words: str, *, count: int = 0) -> KeelwrightError:
        """Return the error for a server that answers nothing.

        Args:
            reason: Why the last item failed.
            words: What it ran into.
            count: Items that failed in a row.
        """
        items = f" for {count} items in a row" if count > 1 else ""
        found = f"{reason}: {words}" if words else reason
        if reason in (Why.REQUEST.value, Why.TOO_LONG.value, Why.LIMIT.value):
            return ConfigError(
                f"The server at {self._url} refuses what it is asked{items}.",
                expected=f"a server whose model '{self._model}' takes these requests",
                found=found,
                fix="see the server's words; a base model without a chat template takes only prompts as they are",
            )
        kind = MissingError if self._is_local or reason != "connection" else OfflineError
        return kind(
            f"The server at {self._url} does not answer{items}.",
            expected="an OpenAI-compatible server at that address",
            found=found,
            fix="check that the server runs and that the address is right; the same command then goes on",
        )


def fatal(refused: Refused, *, url: str, model: str, variable: str) -> KeelwrightError | None:
    """Return the error for a refusal that every item would meet; None where it may be this item's alone.

    Args:
        refused: What the server said.
        url: Its address.
        model: What it was asked for.
        variable: Words for where the key comes from.
    """
    if refused.why is Why.KEY:
        return MissingError(
            f"The server at {url} does not let us in.",
            expected="a key that the server takes, in an environment variable",
            found=f"{refused.words} ({variable})",
            fix="set the variable to a valid key, or name another one with api_key_env",
        )
    if refused.why is Why.QUOTA:
        return MissingError(
            f"The account at {url} has nothing left.",
            expected="an account with enough quota",
            found=refused.words,
            fix="add to the account, then run the same command: answers that are there are kept",
        )
    if refused.why is Why.PLACE:
        return MissingError(
            f"The server at {url} has no model '{model}', or is not an OpenAI-compatible one.",
            expected="a model that the server has, at an address that ends in /v1",
            found=refused.words,
            fix="check the model's name and the address",
        )
    if refused.why is Why.SETTING:
        return ConfigError(
            f"The server at {url} refuses a setting that decides the answers.",
            expected="a model that takes temperature, top_p, seed and a limit on tokens",
            found=refused.words,
            fix="choose a decoding that the server offers, or another model",
        )
    return None


def unknown_model(model: str, url: str, offered: Collection[str]) -> ConfigError:
    """Return the error for a model that the server does not have.

    Args:
        model: What was asked for.
        url: The server's address.
        offered: The models that it has.
    """
    known = sorted(offered)
    more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
    close = difflib.get_close_matches(model, known, n=5, cutoff=0.0)
    return ConfigError(
        f"The server at {url} has no model '{model}'.",
        expected=f"one of {', '.join(known[:_SHOWN])}{more}" if known else "a server that has a model loaded",
        found=model,
        fix=nearest(model, close) if close else "load a model into the server",
    )
