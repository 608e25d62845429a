# SPDX-License-Identifier: Apache-2.0
"""What an output is written as, beside what the method says: its tokens, its rounding, F8, a lower rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from keelwright.core.config import require_choice, require_in_range
from keelwright.core.errors import ConfigError
from keelwright.ops.lowrank import require_target
from keelwright.weights.vocabulary import POLICIES, Policy

Rounding = Literal["nearest", "stochastic"]
ROUNDINGS: tuple[Rounding, ...] = ("nearest", "stochastic")


@dataclass(frozen=True, slots=True)
class Format:
    """How an output is written; the defaults change nothing."""

    vocabulary: Policy = "strict"
    """Whose tokens the output has where the models' differ: `strict` (an error), `base` (the aligned model's),
    `donor` (those of the model that lays out the output), `union`."""
    pad_to_multiple_of: int | None = None
    """Round the number of rows of embedding and head up to a multiple of this, 1 or more; None keeps the base's."""
    rounding: Rounding = "nearest"
    """`nearest` (ties to even), or `stochastic`: up or down by chance, so that small changes survive on average."""
    rounding_seed: int = 0
    """Seed of rounding by chance, 0 or more."""
    requantize: bool = False
    """Write F8 weights in F8 again, with fresh scales; otherwise they are written as the bfloat16 they stand for."""
    rank: int | None = None
    """Truncate an adapter output to this rank, 1 or more; None: exact."""
    energy: float | None = None
    """Truncate an adapter output to the smallest rank with this share of its squared norm, above 0 to 1."""

    def __post_init__(self) -> None:
        require_choice("vocabulary", self.vocabulary, POLICIES)
        require_choice("rounding", self.rounding, ROUNDINGS)
        require_in_range("rounding_seed", self.rounding_seed, low=0)
        if self.pad_to_multiple_of is not None:
            require_in_range("pad_to_multiple_of", self.pad_to_multiple_of, low=1)
        if self.is_truncated:
            require_target(self.rank, self.energy)
        if self.requantize and self.rounding != "nearest":
            raise ConfigError(
                "F8 weights are rounded to nearest.",
                expected="either --requantize or --rounding stochastic",
                found="both",
                fix="leave one of them out",
            )
        if self.is_truncated and self.needs_full:
            raise ConfigError(
                "A lower rank is for adapters, and this output is written in full.",
                expected="either --rank or --energy, or --requantize or --rounding stochastic",
                found="both",
                fix="leave one of them out",
            )

    @property
    def is_truncated(self) -> bool:
        """Whether an adapter output loses rank."""
        return self.rank is not None or self.energy is not None

    @property
    def needs_full(self) -> bool:
        """Whether something is asked for that an adapter cannot have."""
        return self.requantize or self.rounding != "nearest"

    @property
    def fits_tokens(self) -> bool:
        """Whether the models' vocabularies are fitted to each other."""
        return self.vocabulary != "strict" or self.pad_to_multiple_of is not None

    @property
    def seed(self) -> int | None:
        """The seed of rounding by chance; None: to nearest."""
        return self.rounding_seed if self.rounding == "stochastic" else None

    def require_possible(self, *, outputs: int, dtype: str | None) -> None:
        """Raise where the rest of the command does not allow it.

        Args:
            outputs: How many outputs are written from one reading.
            dtype: The dtype asked for, or None.

        Raises:
            ConfigError: F8 is asked for in a sweep, or together with another dtype.
        """
        if self.requantize and outputs > 1:
            raise ConfigError(
                "Several outputs in F8 cannot be written from one reading.",
                expected="one coefficient with --requantize",
                found=f"{outputs} coefficients",
                fix="run the command once per coefficient, or leave --requantize out",
            )
        if self.requantize and dtype is not None:
            raise ConfigError(
                "The output cannot be both in F8 and in another dtype.",
                expected="either --requantize or --out-dtype",
                found=f"--requantize with {dtype}",
                fix="leave one of them out",
            )
