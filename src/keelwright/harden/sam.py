# SPDX-License-Identifier: Apache-2.0
"""SAM: train at the worst point near the weights, so that they end in a flat place.

Sharpness-aware minimisation on the user's rows (tuning stage) or on alignment rows (alignment stage). A flat place is
one from which a little further training changes little, which is why it is tried as a defence.

Source:
    Sharpness-Aware Minimization for Efficiently Improving Generalization, arXiv 2010.01412 (google-research/sam).
    Adaptive form: ASAM, arXiv 2102.11600. PyTorch port: davda54/sam.

Equation:
    g = grad u(w + e),   e = rho * grad u(w) / (||grad u(w)|| + 1e-12)
    adaptive:            e = rho * w^2 grad u(w) / (|| |w| grad u(w) || + 1e-12)

    | symbol | name |
    |---|---|
    | u | term `task` (`rows: user`) or `alignment` (`rows: alignment`) |
    | rho | `rho` |

Differs from the official code:
    Nowhere known in the formulas. Both passes drop the same units; over several processes the norm is that of the
    summed gradient (the first code steps on each device by itself, and so do ports without a reduction).

Cost:
    Two forward and backward passes per step; one more gradient and one copy of the trained weights.

Limits:
    No published figure says that it keeps a language model safe. In the lab it does not: with 2 % harmful rows among
    the user's, 150 steps at 5e-5, the harm rate is .98 with rho .05 and .97 with plain tuning; with rho .2 it is .73,
    but the task is learnt less as well (its loss, at the shifted weights, .76 against .31 with rho .05). On alignment
    rows, 100 steps at 3e-4 before the same tuning: .99 (one seed, 150 requests each). Weights in half precision
    swallow e: keep them in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, cast, get_args

from keelwright.core.config import require_choice, require_in_range
from keelwright.data.asking import PLAIN, Asking
from keelwright.data.row_sets import RowSets
from keelwright.training.config import TrainConfig
from keelwright.training.defence import Stage, settings_of
from keelwright.training.memory import Copies
from keelwright.training.recipe import Feed, Recipe
from keelwright.training.terms import Objective, Term, WeightShift

Rows = Literal["user", "alignment"]

_EPS: Final = 1e-12
"""Added to the norm, as in the paper's code and the port."""


@dataclass(frozen=True, slots=True)
class SamConfig:
    """Settings of SAM."""

    rho: float = 0.05
    """Length of the step in weight units, 0 or more; 0 is plain training. The paper's CIFAR runs: .05. `adaptive` needs
    about ten times as much (the port: 2)."""
    adaptive: bool = False
    """Weights move in proportion to their squares: ASAM."""
    rows: Rows = "user"
    """`user`: a defence of the tuning stage; `alignment`: one of the alignment stage."""

    def __post_init__(self) -> None:
        require_in_range("rho", self.rho, low=0.0)
        require_choice("rows", self.rows, get_args(Rows))


@dataclass
class SamObjective(Objective):
    """A loss at the worst point near the weights."""

    config: SamConfig = SamConfig()

    def terms(self, step: int) -> Sequence[Term]:
        """Return u at the shifted weights."""
        rho, adaptive = self.config.rho, self.config.adaptive
        at = WeightShift(rho, eps=_EPS, adaptive=adaptive) if rho else None
        return (Term("task" if self.config.rows == "user" else "alignment", self.feed, at=at),)


class _ByRows:
    """An attribute that follows `config.rows`; of the class, what it is by default."""

    def __init__(self, user: Any, alignment: Any) -> None:
        self._values = {"user": user, "alignment": alignment}

    def __get__(self, defence: Sam | None, owner: type[Sam]) -> Any:
        return self._values["user" if defence is None else defence.config.rows]


@dataclass(frozen=True, slots=True)
class Sam:
    """SAM as a defence of either stage."""

    config: SamConfig = SamConfig()

    config_class: ClassVar[type[SamConfig]] = SamConfig
    stage: ClassVar[Stage] = cast("Stage", _ByRows("tuning", "alignment"))
    roles: ClassVar[tuple[str, ...]] = cast("tuple[str, ...]", _ByRows((), ("safety",)))
    copies: ClassVar[Copies] = Copies(gradients=1, weights=1)

    def recipe(self, rows: RowSets, train: TrainConfig) -> Recipe:
        """Return the training run."""
        who = "The defence 'sam'"
        if self.config.rows == "user":
            feeds = {"user": Feed(rows.require("user", who=who))}
        else:
            feeds = {"safety": Feed(rows.alignment(who=who))}
        objective = SamObjective(feed=next(iter(feeds)), config=self.config)
        return Recipe(feeds, train, objective, settings_of("sam", self.config))

    def asking(self) -> Asking:
        """Return requests as they are."""
        return PLAIN
