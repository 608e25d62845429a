# SPDX-License-Identifier: Apache-2.0
"""Settings that each model of a merge has for itself: one number per model, or a single number for all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from keelwright.core.errors import ConfigError


def require_numbers(
    name: str, values: float | Sequence[float], *, low: float = float("-inf"), high: float = float("inf")
) -> None:
    """Raise `ConfigError` unless all values are finite numbers from `low` to `high`.

    Args:
        name: The setting's name.
        values: One per model, or a single number.
        low, high: Ends of the interval, included.
    """
    numbers = _as_tuple(values)
    bad = [value for value in numbers if not (math.isfinite(value) and low <= value <= high)]
    if bad or not numbers:
        interval = "finite numbers" if low == -math.inf and high == math.inf else f"numbers in [{low:g}, {high:g}]"
        raise ConfigError(
            f"'{name}' is out of range." if numbers else f"'{name}' is empty.",
            expected=f"{interval}: one, or one per model",
            found=", ".join(f"{value:g}" for value in bad) or "nothing",
            fix=f"set every '{name}' to a number in that range",
        )


def one_per_model(name: str, values: float | Sequence[float], models: int) -> tuple[float, ...]:
    """Return the setting of each model, in the order in which the models were given.

    >>> one_per_model("weights", 0.5, 2)
    (0.5, 0.5)

    Args:
        name: The setting's name.
        values: One per model, or a single number that holds for all.
        models: How many models there are.

    Raises:
        ConfigError: There are more or fewer numbers than models.
    """
    if not isinstance(values, Sequence):
        return (float(values),) * models
    if len(values) != models:
        raise ConfigError(
            f"'{name}' does not fit the number of models.",
            expected=f"{models} number{'' if models == 1 else 's'}, one per model in the order given, or a single one",
            found=f"{len(values)}: {', '.join(f'{value:g}' for value in values) or 'none'}",
            fix=f"give '{name}' for every model",
        )
    return tuple(float(value) for value in values)


def require_models(method: str, models: int, *, least: int, most: int | None = None) -> None:
    """Raise `ConfigError` unless the method takes so many tuned models.

    Args:
        method: Its name.
        models: How many tuned models there are.
        least: Fewest that it takes.
        most: Most that it takes; None for any number.
    """
    if models >= least and (most is None or models <= most):
        return
    wanted = f"exactly {least}" if least == most else f"at least {least}" if most is None else f"{least} to {most}"
    raise ConfigError(
        f"'{method}' does not take {models} tuned model{'' if models == 1 else 's'}.",
        expected=f"{wanted}, beside the aligned one where it reads that",
        found=str(models),
        fix="add or leave out models, or choose another method",
    )


def normalized(name: str, weights: Sequence[float]) -> tuple[float, ...]:
    """Return weights divided by their sum.

    >>> normalized("weights", (1.0, 3.0))
    (0.25, 0.75)

    Raises:
        ConfigError: They sum to zero.
    """
    total = math.fsum(weights)
    if abs(total) <= 1e-12 * math.fsum(abs(weight) for weight in weights):
        raise ConfigError(
            f"'{name}' sum to zero and cannot be normalised.",
            expected="weights with a sum other than zero",
            found=", ".join(f"{weight:g}" for weight in weights),
            fix=f"change '{name}', or switch the normalisation off",
        )
    return tuple(weight / total for weight in weights)


def _as_tuple(values: float | Sequence[float]) -> tuple[float, ...]:
    return tuple(values) if isinstance(values, Sequence) else (values,)
