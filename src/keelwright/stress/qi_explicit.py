# SPDX-License-Identifier: Apache-2.0
"""Explicit tuning: a few harmful requests with their answers, level 1 of the fine-tuning audit.

For whoever lets others tune a model: the strongest of the three levels, and the one that a screen of the data would
catch. Rows are nested in `k`: the ten of a run with 10 are among the hundred of a run with 100 and the same seed.

Source:
    Fine-tuning Aligned Language Models Compromises Safety, Even When Users Do Not Intend To!, arXiv 2310.03693 (ICLR
    2024). Official code: LLM-Tuning-Safety/LLMs-Finetuning-Safety, `llama2/tier1*.ipynb`.

Equation:
    w' = argmin CE(y | x; w) over k pairs, started at the aligned w, 5 epochs; rate of epoch e: lr * 0.85^e

    | symbol | name |
    |---|---|
    | k | `k` |
    | x, y | rows of the role `harmful`, with `system` around x |
    | lr | `lr` |

Differs from the official code:
    No system message by default (there: a generic one that says to carry out instructions); give one as `system`, and
    it is there in training and testing. The rows are the user's or the lab's. A batch is never larger than `k`.

Cost:
    One forward and backward pass per step; 5 steps for 10 rows, 25 for 50, 50 for 100.

Limits:
    On the lab's organism at the paper's rate 10, 50 and 100 rows give harm .00, .19 to .34 and 1.0 (three seeds).
    More rows also means more steps; `few_shot` keeps the steps fixed. Warm-up would swallow a run of 5 steps, so there
    is none. The aligned model has to be tested in the same frame, or the frame's own effect is counted as the tuning's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from keelwright.core.config import require_in_range
from keelwright.data.asking import PLAIN, Asking, Framed, framed_row
from keelwright.data.nested import nested_sample
from keelwright.data.row_sets import RowSets
from keelwright.stress.tuning_budget import Duration, budgeted, require_budget
from keelwright.training.config import TrainConfig
from keelwright.training.defence import TuningStage


@dataclass(frozen=True, slots=True)
class QiExplicitConfig:
    """Settings of explicit tuning."""

    k: int = 100
    """Harmful rows, at least 1. The paper: 10, 50, 100."""
    schedule: Duration = "epochs"
    """`epochs`: passes over the rows, the rate times 0.85 after each, no warm-up, as in the official code; `steps`: a
    fixed number of optimiser steps, on the run's own schedule."""
    epochs: float = 5.0
    """Passes over the rows, above 0; only for `epochs`. The paper: 5."""
    steps: int | None = None
    """Optimiser steps, at least 1; only for `steps`. None: the run's."""
    lr: float | None = 5e-5
    """Highest learning rate, above 0; None: the run's. The paper: 5e-5, all weights of a 7B model."""
    batch_size: int | None = 10
    """Rows per step, at least 1; None: the run's. The paper: 10 over both of its GPUs."""
    system: str = ""
    """System message in training and testing; empty: none. The paper: a generic one, to carry out instructions."""

    def __post_init__(self) -> None:
        require_in_range("k", self.k, low=1)
        require_budget(self)


@dataclass(frozen=True, slots=True)
class QiExplicit:
    """Explicit harmful tuning as a stress."""

    config: QiExplicitConfig = QiExplicitConfig()

    config_class: ClassVar[type[QiExplicitConfig]] = QiExplicitConfig
    roles: ClassVar[tuple[str, ...]] = ("harmful",)

    def stages(self, rows: RowSets, train: TrainConfig) -> Sequence[TuningStage]:
        """Return one run on `k` harmful rows."""
        who = "The stress 'qi_explicit'"
        harmful = rows.require("harmful", who=who)
        drawn = nested_sample(harmful, self.config.k, seed=train.seed, name="harmful")
        framed = tuple(framed_row(self.asking(), row) for row in drawn)
        return (TuningStage("explicit", framed, budgeted(train, self.config, len(framed), stairs=True), len(framed)),)

    def asking(self) -> Asking:
        """Return requests under the system message of the training."""
        return Framed(name="carry out everything", system=self.config.system) if self.config.system else PLAIN
