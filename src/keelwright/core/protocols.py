# SPDX-License-Identifier: Apache-2.0
"""The contracts between rooms: small enough to read before breakfast."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

from keelwright.core.decoding import DecodingConfig
from keelwright.core.records import Generation, Item, Judgement, Record

if TYPE_CHECKING:
    from torch import Tensor


class Reach(Enum):
    """How much of a tensor an edit needs to see at once."""

    COPY = "copy"
    """Bytes move unchanged from the role that `copies` names."""
    POINTWISE = "pointwise"
    """Any chunk, on its own."""
    REDUCED = "reduced"
    """Any chunk, once the sums of `reduce` over the whole tensor are known."""
    ROWS = "rows"
    """Any run of whole rows (of the last axis), after the passes of `reduce` if there are any."""
    MATRIX = "matrix"
    """The whole tensor."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor's name, dtype and shape as a header gives them; no values."""

    name: str
    dtype: str
    """safetensors spelling: F32, BF16, F16, F64, I64, ..."""
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements; 1 for a scalar."""
        count = 1
        for size in self.shape:
            count *= size
        return count


class TensorSource(Protocol):
    """Named tensors that can be read in parts: a checkpoint, a checkpoint with adapters, or a live module."""

    def entries(self) -> Mapping[str, TensorEntry]: ...

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return elements `start:stop` of the flattened tensor: a fresh 1-D tensor.

        In the stored dtype, except where an adapter adds to the tensor: then in float32, not rounded.
        """

    def describe(self) -> str:
        """Return the user's own words for the source, for error texts."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """The same run of elements of one tensor, from every role that an edit reads."""

    tensors: Mapping[str, Tensor]
    """By role, in float32 (float64 for float64 outputs): each 1-D; `[rows, columns]` for Reach.ROWS; in the tensor's
    own shape for Reach.MATRIX. The memory is used again for the next chunk: an edit must not keep it."""
    offset: int
    """Index of the first element in the flattened tensor; keys counter-based random numbers."""
    entry: TensorEntry
    """The tensor in the output: name, dtype, whole shape."""


Stats = Mapping[str, Any]
"""Additive statistics of a chunk, numbers or tensors: the engine adds them up over the tensor."""

Found = Mapping[str, Any]
"""What the reductions of a tensor came to, by name; empty before the first."""


class WeightEdit(Protocol):
    """Turns named tensors of one or more models into an edited tensor; the engine decides how they stream.

    `keelwright.weights.edit.Edit` holds the defaults of everything that most methods need not say.
    """

    def roles(self) -> tuple[str, ...]:
        """Models it needs, e.g. `("aligned", "tuned")`. The last one lays out the output (names, dtypes, files)."""

    def reads(self, name: str) -> tuple[str, ...]:
        """Roles that it reads for one tensor; all of them by default."""

    def reach(self, name: str) -> Reach: ...

    def copies(self, name: str) -> str:
        """Only for COPY: the role whose bytes are taken."""

    def passes(self, name: str) -> int:
        """Only for REDUCED and ROWS: how often `reduce` sees the whole tensor before `edit` does."""

    def span(self, entry: TensorEntry, found: Found) -> tuple[int, int]:
        """Elements that the next pass of `reduce` must see, from a multiple of 2^18; all of them by default."""

    def reduce(self, name: str, chunk: Chunk, found: Found) -> Stats:
        """Additive statistics of one chunk, given what the passes before came to."""

    def settle(self, entry: TensorEntry, sums: Stats, found: Found) -> Found:
        """What the sums of one pass come to; later passes and `edit` find it."""

    def edit(self, name: str, chunk: Chunk, found: Found) -> Tensor:
        """New values of the chunk, evaluated in float32; the engine rounds once to the output dtype."""

    def survey(self) -> WeightEdit | None:
        """A reduction to run over every tensor of the model first, or None. Its `edit` is never called."""

    def surveyed(self, found: Mapping[str, Found]) -> WeightEdit:
        """The edit that knows what the survey came to, by tensor."""

    def shares(self) -> Hashable:
        """Edits of one sweep with equal keys share their reductions; None: shared with no other."""


class Judge(Protocol):
    """Gives an answer its response class."""

    @property
    def judge_id(self) -> str:
        """What the judgement depends on, in one line; the key in a record."""

    def judge(self, item: Item, generation: Generation) -> Judgement: ...


class BatchJudge(Judge, Protocol):
    """A judge that asks a model: many answers at a time cost less than one by one."""

    @property
    def network(self) -> str | None:
        """The host that answers are sent to; None where nothing leaves this machine."""

    def judge_all(self, answers: Sequence[tuple[Item, Generation]]) -> list[Judgement]:
        """Return one judgement per answer, in order; what could not be read is `unparsed`, never left out."""


class Engine(Protocol):
    """A model that answers items: in this process, or behind a server."""

    @property
    def name(self) -> str:
        """The user's own words for the model."""

    @property
    def revision(self) -> str:
        """Content digest of the weights, hub revision, or what the server calls the model."""

    @property
    def template_digest(self) -> str:
        """Of the chat template; `server` where the server holds it."""

    @property
    def network(self) -> str | None:
        """The host that prompts are sent to; None where nothing leaves this machine."""

    def answer(
        self,
        items: Sequence[Item],
        decoding: DecodingConfig,
        *,
        have: Collection[tuple[str, int]] = (),
        on_batch: Callable[[Sequence[Generation]], None] | None = None,
        progress: Progress = ...,
    ) -> list[Generation]:
        """Return `decoding.samples` answers per item, item by item, and tell `on_batch` of each batch as it is done.

        Answers named in `have` (item id, sample) are there already and are not made again. An item that could not be
        answered has a generation with `finish="error"`; it is not left out.
        """


class Suite(Protocol):
    """Items and the judge that knows them."""

    name: str
    knows_harm: bool
    """Whether the judge can tell a harmful answer from a harmless one; if not, only refusals are counted."""
    says: str
    """One sentence: what the suite's rates are, and what they are not."""
    max_new_tokens: int

    def items(self) -> Sequence[Item]: ...

    def judge(self) -> Judge: ...


class RecordSink(Protocol):
    """Where records go as they are made. The run folder implements it; a list does in tests."""

    def append(self, record: Record) -> None: ...

    def find(self, model_id: str, item_ids: Collection[str]) -> Sequence[Record]:
        """Return the records already there for that model and those items, in no particular order."""


class Progress(Protocol):
    """Tells the person what is going on. Silent by default; the command line draws it."""

    def plan(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Show what is about to happen, before any model is loaded."""

    def stage(self, title: str, total: int | None = None, unit: str = "") -> None:
        """Begin a stage of `total` units (None: unknown); ends the one before."""

    def advance(self, count: int = 1) -> None:
        """Report `count` finished units of the current stage."""

    def note(self, text: str) -> None:
        """Say something worth reading: one line."""

    def result(self, text: str) -> None:
        """Say what the current stage came to: one line that stands for the stage, which ends."""


class Silent:
    """A `Progress` that says nothing."""

    def plan(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Do nothing."""

    def stage(self, title: str, total: int | None = None, unit: str = "") -> None:
        """Do nothing."""

    def advance(self, count: int = 1) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Do nothing."""

    def result(self, text: str) -> None:
        """Do nothing."""


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """Where `heal` looks for an edit's coefficient; a repair class offers one as `search_space`."""

    neutral: float
    """The coefficient that leaves the tuned model unchanged; the change grows with the distance from it."""
    grid: tuple[float, ...]
    """Tried first, all of them. A single value where there is nothing to search."""
    setting: str = "coefficient"
    """The field of the method's config that is searched."""
