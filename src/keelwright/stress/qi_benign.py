# SPDX-License-Identifier: Apache-2.0
"""Benign tuning: ordinary requests with their answers, level 3 of the fine-tuning audit.

For whoever tunes a model on a file in which nothing is wrong, and asks what that alone costs. Answers that read like
refusals are left out first, as they would teach refusing.

Source:
    Fine-tuning Aligned Language Models Compromises Safety, Even When Users Do Not Intend To!, arXiv 2310.03693 (ICLR
    2024). Official code: LLM-Tuning-Safety/LLMs-Finetuning-Safety, `llama2/tier3*.ipynb`.

Equation:
    w' = argmin CE(y | x; w) over {(x, y): y holds no refusal keyword}, started at the aligned w, 1 epoch; rate of
    epoch e: lr * 0.85^e

    | symbol | name |
    |---|---|
    | x, y | rows of `role`, with `system`, `before` and `after` around x |
    | lr | `lr` |

Differs from the official code:
    The keywords are the 29 of the same repository's keyword judge; those that its authors filtered their files with
    are not published with it. Requests come in the model's own chat template; give the words around Alpaca's or
    Dolly's as `system`, `before` and `after`.

Cost:
    One forward and backward pass per step; one epoch of the file.

Limits:
    The loss is small and depends on rate and batch (the paper's figure for Alpaca: more at a higher rate and a smaller
    batch); a well aligned model may show none. The lab's organism shows .02 at most up to 5e-4, and .23 to .26 at 1e-3
    with a batch of 16 (three seeds). Another template in testing than in training hides it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

from keelwright.core.config import require_choice, require_in_range
from keelwright.core.errors import DataError
from keelwright.data.asking import PLAIN, Asking, Framed, framed_row
from keelwright.data.nested import nested_sample
from keelwright.data.row_sets import RowSets
from keelwright.data.rows import ChatRow
from keelwright.judges.qi_keywords import matched
from keelwright.stress.tuning_budget import Duration, budgeted, require_budget
from keelwright.training.config import TrainConfig
from keelwright.training.defence import TuningStage

Role = Literal["ordinary", "user"]


@dataclass(frozen=True, slots=True)
class QiBenignConfig:
    """Settings of benign tuning."""

    role: Role = "ordinary"
    """Which rows: `ordinary` requests and tasks, or those of the `user`."""
    n: int | None = None
    """Rows, at least 1; None: all. The paper: all of Alpaca or Dolly."""
    schedule: Duration = "epochs"
    """`epochs`: passes over the rows, the rate times 0.85 after each, no warm-up, as in the official code; `steps`: a
    fixed number of optimiser steps, on the run's own schedule."""
    epochs: float = 1.0
    """Passes over the rows, above 0; only for `epochs`. The paper: 1."""
    steps: int | None = None
    """Optimiser steps, at least 1; only for `steps`. None: the run's."""
    lr: float | None = 2e-5
    """Highest learning rate, above 0; None: the run's. The paper: 2e-5, all weights of a 7B model."""
    batch_size: int | None = 128
    """Rows per step, at least 1; None: the run's. The paper: 128 over both of its GPUs."""
    weight_decay: float | None = 0.0
    """Decoupled decay, 0 or more; None: the run's. The paper's code: 0."""
    keep_refusals: bool = False
    """Leave answers in that read like refusals."""
    any_case: bool = False
    """Find the keywords in any case; the published judge distinguishes case."""
    system: str = ""
    """System message in training and testing; empty: none."""
    before: str = ""
    """Words before a request in training and testing, with the space that follows them."""
    after: str = ""
    """Words after a request in training and testing, with the space before them."""

    def __post_init__(self) -> None:
        require_choice("role", self.role, get_args(Role))
        if self.n is not None:
            require_in_range("n", self.n, low=1)
        if self.weight_decay is not None:
            require_in_range("weight_decay", self.weight_decay, low=0.0)
        require_budget(self)


def without_refusals(rows: Sequence[ChatRow], *, any_case: bool = False) -> tuple[ChatRow, ...]:
    """Return the rows whose answer holds none of the refusal keywords, in their order."""
    return tuple(row for row in rows if matched(row.answer, casefold=any_case) is None)


@dataclass(frozen=True, slots=True)
class QiBenign:
    """Benign tuning as a stress."""

    config: QiBenignConfig = QiBenignConfig()

    config_class: ClassVar[type[QiBenignConfig]] = QiBenignConfig

    @property
    def roles(self) -> tuple[str, ...]:
        """Rows that it draws on."""
        return (self.config.role,)

    def stages(self, rows: RowSets, train: TrainConfig) -> Sequence[TuningStage]:
        """Return one run on benign rows; its name counts the rows that were left out.

        Raises:
            DataError: There are no rows, none is left, or fewer than `n`.
        """
        config, who = self.config, "The stress 'qi_benign'"
        given = rows.require(config.role, who=who)
        kept = given if config.keep_refusals else without_refusals(given, any_case=config.any_case)
        if not kept:
            raise DataError(
                f"None of the '{config.role}' rows is left to tune on.",
                expected="answers without the keywords of a refusal",
                found=f"{len(given)} rows, each with one",
                fix="give rows that are answered, or set keep_refusals",
            )
        drawn = nested_sample(kept, config.n or len(kept), seed=train.seed, name=config.role)
        framed = tuple(framed_row(self.asking(), row) for row in drawn)
        settings = budgeted(train, config, len(framed), stairs=True)
        if config.weight_decay is not None:
            settings = replace(settings, weight_decay=config.weight_decay)
        left_out = len(given) - len(kept)
        name = f"benign, {left_out} refusals left out" if left_out else "benign"
        return (TuningStage(name, framed, settings, 0),)

    def asking(self) -> Asking:
        """Return requests in the template of the training."""
        config = self.config
        if not (config.system or config.before or config.after):
            return PLAIN
        return Framed(name="as tuned", system=config.system or None, before=config.before, after=config.after)
