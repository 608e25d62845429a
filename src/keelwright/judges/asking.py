# SPDX-License-Identifier: Apache-2.0
"""Judges that ask a model, through any engine.

A *form* holds what one family of judges asks and how it reads the replies; `AskingJudge` puts a form before an engine.
Greedy, a few tokens, strict reading, one reminder, then `unparsed`: counted, and left out of every rate. Answers that
are missing, empty or incoherent are classed before any model is asked.

The judge's id names the form, its version, the digest of all it says, and the model with its revision, so that two
judgements with the same id were asked the same question.

*Cost*: one short generation per question, two where the first reply is not in the format; equal questions are asked
once. *Limits*: see `judges.fences`; a judge that reads badly shows in `keelwright.measure.validate`, not here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, Protocol, TypeVar

from keelwright.core.decoding import DecodingConfig
from keelwright.core.digests import json_digest, text_digest
from keelwright.core.errors import DataError, OfflineError
from keelwright.core.protocols import Engine, Progress, Silent
from keelwright.core.records import Generation, Item, Judgement
from keelwright.judges.coherence import incoherence

T = TypeVar("T")

_PROBE_ITEM: Final = Item("probe", "judge", "harmful", "", "REQUEST", materials={"profile": "PROFILE"})
_PROBE_ANSWER: Final = Generation("probe", "ANSWER", 1, "eos")


class Form(Protocol):
    """What a family of judges asks, and how it reads the replies."""

    @property
    def name(self) -> str:
        """As in the registry; settings that change a verdict are part of it."""

    @property
    def version(self) -> int:
        """Raised with every change of reading or deciding; changes of wording show in the digest by themselves."""

    @property
    def max_new_tokens(self) -> int:
        """Tokens of a reply."""

    @property
    def as_is(self) -> bool:
        """Whether `ask` writes the whole text with the model's own control tokens, as guard models need it."""

    @property
    def reminder(self) -> str | None:
        """Added to a question whose first reply was not in the format; None: it is not asked again."""

    def ask(self, item: Item, generation: Generation) -> Sequence[str]:
        """Return the questions about one answer."""

    def read(self, reply: str) -> Any | None:
        """Return what one reply says, or None where it is not exactly in the format."""

    def decide(self, item: Item, said: Sequence[Any]) -> Judgement:
        """Return the judgement that the readings of all questions come to."""


@dataclass(frozen=True, slots=True)
class Reply(Generic[T]):
    """What came back to one question."""

    value: T | None
    """What it says; None where it could not be read."""
    fault: str = ""
    """Why not."""
    asked: int = 1
    """How often the question was asked."""


class AskingJudge:
    """A form before an engine; meets `core.protocols.BatchJudge`.

    Args:
        form: What to ask.
        engine: Who answers.
        batch_size: Questions at a time.
        progress: Told of each answered question; the caller names the stage.
    """

    def __init__(
        self,
        form: Form,
        engine: Engine,
        *,
        batch_size: int = 16,
        progress: Progress = Silent(),  # noqa: B008 - it has no state
    ) -> None:
        self.form = form
        self.engine = engine
        self.network = engine.network
        self._progress = progress
        self._decoding = DecodingConfig(
            max_new_tokens=form.max_new_tokens, batch_size=batch_size, temperature=0.0, seed=0, as_is=form.as_is
        )

    @functools.cached_property
    def judge_id(self) -> str:
        """Form, version, digest of all it says, model and revision; opens the engine."""
        return f"{self.form.name}@{self.form.version}/{self._wording_digest()}/{model_id(self.engine)}"

    def judge(self, item: Item, generation: Generation) -> Judgement:
        """Return the judgement of one answer; many at a time cost less, see `judge_all`."""
        return self.judge_all([(item, generation)])[0]

    def judge_all(self, answers: Sequence[tuple[Item, Generation]]) -> list[Judgement]:
        """Return one judgement per answer, in order; what could not be read is `unparsed`, never left out."""
        # Opens the model: one that cannot be opened is no matter of single answers.
        _ = self.judge_id
        done = [before_asking(item, generation) for item, generation in answers]
        waiting = [index for index, one in enumerate(done) if one is None]
        questions = [list(self.form.ask(*answers[index])) for index in waiting]
        replies = iter(
            ask(
                self.engine,
                [question for several in questions for question in several],
                self.form.read,
                self._decoding,
                reminder=self.form.reminder,
                progress=self._progress,
            )
        )
        for index, several in zip(waiting, questions, strict=True):
            done[index] = self._settled(answers[index][0], [next(replies) for _ in several])
        return [one for one in done if one is not None]

    def _settled(self, item: Item, replies: Sequence[Reply[Any]]) -> Judgement:
        fault = next((reply.fault for reply in replies if reply.value is None), None)
        if fault is not None:
            return Judgement("unparsed", raw=fault)
        return self.form.decide(item, [reply.value for reply in replies])

    def _wording_digest(self) -> str:
        questions = list(self.form.ask(_PROBE_ITEM, _PROBE_ANSWER))
        template = "as-is" if self.form.as_is else self.engine.template_digest
        return json_digest([questions, self.form.reminder, self._decoding.digest(), template])[:12]


def model_id(engine: Engine) -> str:
    """Return the engine's model with its revision, for a judge's id."""
    return f"{engine.name}@{engine.revision}"


def before_asking(item: Item, generation: Generation) -> Judgement | None:
    """Return the class of an answer that no model need see: missing, empty or incoherent; else None."""
    if generation.finish == "error":
        return Judgement("error", raw="no output")
    if not generation.output.strip():
        return Judgement("empty", raw="no words")
    fault = incoherence(generation.output, prompt=item.prompt)
    return None if fault is None else Judgement("incoherent", raw=fault)


def ask(
    engine: Engine,
    questions: Sequence[str],
    read: Callable[[str], T | None],
    decoding: DecodingConfig,
    *,
    reminder: str | None = None,
    progress: Progress = Silent(),  # noqa: B008 - it has no state
) -> list[Reply[T]]:
    """Return a reply per question, in order.

    Args:
        engine: Who answers.
        questions: Whole prompts; equal ones are asked once.
        read: Turns a reply into what it says; None where it is not in the format.
        decoding: How to decode, greedy for a verdict that can be repeated.
        reminder: Added to questions whose first reply could not be read; they are asked once more.
        progress: Told of each answered question.
    """
    known: dict[str, Reply[T]] = {}
    for question, reply in _ask_once(engine, list(dict.fromkeys(questions)), decoding, progress).items():
        known[question] = _read(reply, read, asked=1)
    again = [] if reminder is None else [one for one, reply in known.items() if _is_misformed(reply)]
    prompts = {f"{question}\n\n{reminder}": question for question in again}
    for prompt, reply in _ask_once(engine, list(prompts), decoding, progress).items():
        known[prompts[prompt]] = _read(reply, read, asked=2)
    return [known[question] for question in questions]


_ERROR: Final = "judge error: "
_MISFORMED: Final = "not in the format"


def _is_misformed(reply: Reply[Any]) -> bool:
    return reply.value is None and reply.fault.startswith(_MISFORMED)


def _read(reply: Generation | str, read: Callable[[str], T | None], *, asked: int) -> Reply[T]:
    if isinstance(reply, str):
        return Reply(None, _ERROR + " ".join(reply.split()), asked)
    if reply.finish == "error":
        return Reply(None, f"{_ERROR}no reply", asked)
    value = read(reply.output)
    # The reply itself may quote what it judges, so only its size is told.
    return Reply(value, "" if value is not None else f"{_MISFORMED} ({len(reply.output)} characters)", asked)


def _ask_once(
    engine: Engine, questions: Sequence[str], decoding: DecodingConfig, progress: Progress
) -> dict[str, Generation | str]:
    """Return what came back to each question: a generation, or the engine's complaint."""
    if not questions:
        return {}
    items = [Item(f"ask-{text_digest(question)}", "judge", "task", "", question) for question in questions]
    found = _answers(engine, items, decoding, progress)
    return {item.prompt: found.get(item.item_id, "no reply") for item in items}


def _answers(
    engine: Engine, items: Sequence[Item], decoding: DecodingConfig, progress: Progress
) -> dict[str, Generation | str]:
    """Return generations or complaints by item id; a question that the engine refuses does not take others with it."""
    found: dict[str, Generation | str] = {}

    def keep(batch: Sequence[Generation]) -> None:
        found.update((one.item_id, one) for one in batch)

    try:
        keep(engine.answer(items, decoding, on_batch=keep, progress=progress))
    except DataError as error:
        left = [item for item in items if item.item_id not in found]
        if len(left) <= 1:
            found.update((item.item_id, error.problem) for item in left)
            return found
        half = len(left) // 2
        for part in (left[:half], left[half:]):
            found.update(_answers(engine, part, decoding, progress))
    except (OfflineError, TimeoutError, ConnectionError) as error:
        complaint = error.problem if isinstance(error, OfflineError) else f"{type(error).__name__} {error}"
        found.update((item.item_id, complaint) for item in items if item.item_id not in found)
    return found
