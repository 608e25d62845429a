# SPDX-License-Identifier: Apache-2.0
"""Safety mix: a few refusals among the rows that the user tunes on.

What to try first, and the control that every other defence of the tuning stage must beat. Beside the refusals go
ordinary requests and requests that only look harmful, answered, so that the model does not learn to refuse everything.
`mix` is a plain function of rows: what it returns can be given to any trainer, and `conversations` writes it for TRL.

Source:
    Safety-Tuned LLaMAs: Lessons From Improving the Safety of Large Language Models that Follow Instructions,
    arXiv 2309.07875. Code: vinid/safety-tuned-llamas. The weighted form (`lambda_`) is that of the trainer
    `VlguardTrainer` in git-disl's repositories.

Equation:
    mixed:     u over n + k rows in one order,   share = k / (n + k)
    weighted:  u + lambda_t f,                   lambda_t = lambda * r(t), with a mean of lambda over the run
    with u the loss on the user's rows and f the loss on the safety rows and their companions, each per answer token.
    With lambda = T_f / T_u, the answer tokens of the two sets, the weighted gradient is in expectation
    (T_u + T_f) / T_u times the mixed one; where rows are equally long that is lambda = k / n and (n + k) / n.

    | symbol | name |
    |---|---|
    | n, k, share | the user's rows, `k`, `share` |
    | lambda, r | `lambda_`, `schedule` |
    | u, f | terms `task`, `safety` |

Differs from the official code:
    The loss falls on the answers alone (there: on the prompts too). Answered look-alikes and ordinary requests are
    added by default (there: none; the paper reports the over-refusal that follows). The number of steps stays the
    user's, so that more rows mean fewer passes over each: `MixPlan.epochs` says how many.

Cost:
    One forward and backward pass per step; in the weighted form a second one, over `safety_batch` rows. No memory.

Limits:
    Refusals that open alike teach the opening (`MixPlan.openings` counts them). Heavy tuning on harmful answers still
    wins: in the lab 50 refusals among 500 rows, 2 % of them bad, take the harm rate from .89 to .05, and among 500
    with 10 % bad from .99 to .58 (means of three seeds). Refusals alone, at a rate high enough, teach a small model to
    refuse look-alikes and ordinary requests; the companions take steps from the user's task instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Final, Literal, get_args

from keelwright.core.config import require_choice, require_in_range
from keelwright.core.errors import ConfigError, DataError
from keelwright.data.asking import PLAIN, Asking
from keelwright.data.nested import nested_sample
from keelwright.data.row_sets import RowSets
from keelwright.data.rows import ChatRow
from keelwright.training.config import TrainConfig
from keelwright.training.defence import Stage, settings_of
from keelwright.training.feeds import Feeds
from keelwright.training.recipe import Feed, Recipe
from keelwright.training.setup import Setup
from keelwright.training.terms import Objective, Term

MixSchedule = Literal["constant", "rising", "falling"]

DEFAULT_SHARE: Final = 0.03
"""Share of safety rows that the paper's abstract names as enough."""
_OPENING_WORDS: Final = 3


@dataclass(frozen=True, slots=True)
class SafetyMixConfig:
    """Settings of the safety mix."""

    k: int | None = None
    """Safety rows, 0 to the size of their pool; None: by `share`. The paper's sweep: 0, 100, 300, 500, 1000, 1500,
    2000 for 20,000 rows."""
    share: float | None = None
    """Safety rows as a share of themselves and the user's rows, 0 to below 1; None, and no `k`: 0.03, as in the paper's
    abstract."""
    borderline: float = 1.0
    """Answered look-alikes per safety row, 0 or more. The paper: 0."""
    ordinary: float = 1.0
    """Answered ordinary requests per safety row, 0 or more. The paper: 0, as its user's rows are ordinary."""
    lambda_: float | None = None
    """Weight of the safety loss beside the user's, 0 or more; None: the rows are mixed instead. The paper mixes."""
    safety_batch: int = 4
    """Weighted form only: safety rows and companions per step, at least 1. The trainer's code: 4."""
    schedule: MixSchedule = "constant"
    """Weight of the safety loss over the run: `constant`, `rising` from 0 to twice its mean, or `falling` from there
    to 0. Not constant and without `lambda_`: the mean is the weight at which the mix has the same gradient."""

    def __post_init__(self) -> None:
        if self.k is not None and self.share is not None:
            raise ConfigError(
                "The number of safety rows is given twice.",
                expected="'k' or 'share'",
                found=f"k = {self.k}, share = {self.share:g}",
                fix="leave one of them out",
            )
        require_in_range("k", self.k or 0, low=0)
        require_in_range("share", self.share or 0.0, low=0.0, high=1.0, high_open=True)
        require_in_range("borderline", self.borderline, low=0.0)
        require_in_range("ordinary", self.ordinary, low=0.0)
        require_in_range("lambda_", self.lambda_ or 0.0, low=0.0)
        require_in_range("safety_batch", self.safety_batch, low=1)
        require_choice("schedule", self.schedule, get_args(MixSchedule))

    @property
    def weighted(self) -> bool:
        """Whether the safety rows are a term of their own."""
        return self.lambda_ is not None or self.schedule != "constant"

    def rows_for(self, n: int) -> int:
        """Return how many safety rows go to `n` rows of the user."""
        return self.k if self.k is not None else rows_for_share(DEFAULT_SHARE if self.share is None else self.share, n)


@dataclass(frozen=True, slots=True)
class MixPlan:
    """What a mix is made of."""

    user: int
    safety: int
    borderline: int
    ordinary: int
    share: float
    """Safety rows over safety and user's rows, 0 to 1."""
    epochs: float
    """Passes over each of the user's rows that the steps come to; of all rows alike where they are mixed."""
    openings: int
    """Different first three words among the refusals."""


def rows_for_share(share: float, n: int) -> int:
    """Return the whole number `k` for which `k / (n + k)` is nearest to the share."""
    require_in_range("share", share, low=0.0, high=1.0, high_open=True)
    return round(share * n / (1.0 - share))


def share_of(k: int, n: int) -> float:
    """Return `k / (n + k)`; 0 where there is nothing."""
    return k / (n + k) if n + k else 0.0


def companions(
    safety: Sequence[ChatRow],
    borderline: Sequence[ChatRow] = (),
    ordinary: Sequence[ChatRow] = (),
    *,
    k: int,
    seed: int = 0,
    borderline_per_row: float = 1.0,
    ordinary_per_row: float = 1.0,
) -> tuple[tuple[ChatRow, ...], tuple[ChatRow, ...], tuple[ChatRow, ...]]:
    """Return what `mix` adds: safety, borderline and ordinary rows, each nested in `k`.

    Args:
        safety, borderline, ordinary: The pools.
        k: Safety rows.
        seed: Of the draw.
        borderline_per_row, ordinary_per_row: Rows of the other pools per safety row, rounded to whole rows.

    Raises:
        DataError: A pool is too small.
    """
    return (
        nested_sample(safety, k, seed=seed, name="safety"),
        nested_sample(borderline, round(borderline_per_row * k), seed=seed, name="borderline"),
        nested_sample(ordinary, round(ordinary_per_row * k), seed=seed, name="ordinary"),
    )


def mix(
    user: Sequence[ChatRow],
    safety: Sequence[ChatRow],
    borderline: Sequence[ChatRow] | None = None,
    ordinary: Sequence[ChatRow] | None = None,
    *,
    k: int,
    seed: int = 0,
) -> tuple[ChatRow, ...]:
    """Return the user's rows, `k` refusals, and as many answered rows of each further pool that is given.

    The order is that of the pools: whatever trains on the rows shuffles them. With `k` of 0 they are the user's rows.

    Args:
        user: What the model is tuned for.
        safety: Refusals to draw from.
        borderline: Answered look-alikes to draw from; None adds none.
        ordinary: Answered ordinary requests to draw from; None adds none.
        k: Refusals, 0 to the size of their pool.
        seed: Of the draw.

    Raises:
        DataError: A pool is too small.
    """
    added = companions(
        safety,
        borderline or (),
        ordinary or (),
        k=k,
        seed=seed,
        borderline_per_row=float(borderline is not None),
        ordinary_per_row=float(ordinary is not None),
    )
    return (*user, *(row for rows in added for row in rows))


def conversations(rows: Sequence[ChatRow]) -> list[dict[str, list[dict[str, str]]]]:
    """Return rows as TRL's `SFTTrainer` reads them, with the loss on the completion: `Dataset.from_list` takes them.

    Raises:
        DataError: A row gives the beginning of its reply, which this form cannot keep free of loss.
    """
    begun = sum(bool(row.prefill) for row in rows)
    if begun:
        raise DataError(
            "These rows cannot be written as conversations.",
            expected="rows whose whole reply is learned",
            found=f"{begun} of {len(rows)} rows with a 'prefill'",
            fix="train on them with 'keelwright tune'",
        )
    return [
        {
            "prompt": [
                *([] if row.system is None else [{"role": "system", "content": row.system}]),
                {"role": "user", "content": row.prompt},
            ],
            "completion": [{"role": "assistant", "content": row.answer}],
        }
        for row in rows
    ]


def ramp(schedule: MixSchedule, step: int, steps: int) -> float:
    """Return the factor of a step; its mean over the run is 1.

    Args:
        schedule: Its shape.
        step: Counted from 0.
        steps: Of the run.
    """
    done = (step + 0.5) / steps
    return {"constant": 1.0, "rising": 2.0 * done, "falling": 2.0 * (1.0 - done)}[schedule]


def equal_weight(feeds: Feeds) -> float:
    """Return the weight of the safety loss at which the mix has the same gradient: the ratio of answer tokens."""
    tokens = {name: sum(row.answer_tokens for row in feeds.feeds[name].rows) for name in ("user", "safety")}
    return tokens["safety"] / tokens["user"]


@dataclass
class SafetyMixObjective(Objective):
    """The user's rows, and safety rows with a weight."""

    config: SafetyMixConfig = SafetyMixConfig()
    steps: int = 1
    """Of the run."""

    def __post_init__(self) -> None:
        self._weight = self.config.lambda_

    def begin(self, setup: Setup) -> None:
        """Weigh the rows by their tokens, where no weight is given."""
        if self._weight is None:
            self._weight = equal_weight(setup.feeds)

    def terms(self, step: int) -> Sequence[Term]:
        """Return u + lambda_t f."""
        weight = (self._weight or 0.0) * ramp(self.config.schedule, step, self.steps)
        self.figures["safety_weight"] = weight
        return (Term("task", "user"), Term("safety", "safety", weight=weight))


@dataclass(frozen=True, slots=True)
class SafetyMix:
    """The safety mix as a defence of the tuning stage."""

    config: SafetyMixConfig = SafetyMixConfig()

    config_class: ClassVar[type[SafetyMixConfig]] = SafetyMixConfig
    stage: ClassVar[Stage] = "tuning"
    roles: ClassVar[tuple[str, ...]] = ("safety", "borderline", "ordinary")

    def recipe(self, rows: RowSets, train: TrainConfig) -> Recipe:
        """Return the tuning run. Its steps are those of `train`, whatever the number of rows."""
        user = rows.require("user", who="The defence 'safety_mix'")
        added = self._added(rows, train)
        told = {**settings_of("safety_mix", self.config), "mix": self._told(rows, train, added)}
        flat = tuple(row for part in added for row in part)
        if not self.config.weighted:
            return Recipe({"user": Feed((*user, *flat))}, train, Objective(), told)
        if not flat or self.config.lambda_ == 0.0:
            return Recipe({"user": Feed(user)}, train, Objective(), told)
        feeds = {"user": Feed(user), "safety": Feed(flat, self.config.safety_batch)}
        return Recipe(feeds, train, SafetyMixObjective(config=self.config, steps=train.steps), told)

    def plan(self, rows: RowSets, train: TrainConfig) -> MixPlan:
        """Return what the mix is made of, for a plan before the run."""
        return _plan(rows.user, self._added(rows, train), self.config, train)

    def asking(self) -> Asking:
        """Return requests as they are."""
        return PLAIN

    def _added(self, rows: RowSets, train: TrainConfig) -> tuple[tuple[ChatRow, ...], ...]:
        who, config = "The defence 'safety_mix'", self.config
        k = config.rows_for(len(rows.user))
        wanted = {"safety": k, "borderline": round(config.borderline * k), "ordinary": round(config.ordinary * k)}
        # A role that is missing altogether is told of by its flag, one that is too small by its count.
        pools = {role: rows.require(role, who=who) if count else () for role, count in wanted.items()}
        return companions(
            pools["safety"],
            pools["borderline"],
            pools["ordinary"],
            k=k,
            seed=train.seed,
            borderline_per_row=config.borderline,
            ordinary_per_row=config.ordinary,
        )

    def _told(self, rows: RowSets, train: TrainConfig, added: Sequence[Sequence[ChatRow]]) -> Mapping[str, Any]:
        return asdict(_plan(rows.user, added, self.config, train))


def _plan(
    user: Sequence[ChatRow], added: Sequence[Sequence[ChatRow]], config: SafetyMixConfig, train: TrainConfig
) -> MixPlan:
    safety, borderline, ordinary = added
    drawn_from = len(user) if config.weighted else len(user) + sum(map(len, added))
    return MixPlan(
        user=len(user),
        safety=len(safety),
        borderline=len(borderline),
        ordinary=len(ordinary),
        share=share_of(len(safety), len(user)),
        epochs=train.steps * train.batch_size / drawn_from,
        openings=len({" ".join(row.answer.lower().split()[:_OPENING_WORDS]) for row in safety}),
    )
