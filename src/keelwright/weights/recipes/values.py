# SPDX-License-Identifier: Apache-2.0
"""A setting as a recipe gives it, and its value for one tensor at one depth."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from keelwright.core.errors import ConfigError

Scalar = float | bool | str
"""What a setting comes to for one tensor."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where a layer stands in its slice: `index` of `count`; the depth is `index / (count - 1)`, 1 for a lone layer."""

    index: int
    count: int


OUTSIDE = Position(0, 2)
"""Depth 0: what lies outside the layers, the head included, takes the first value of a list."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A value, or a list of values over depth, for the tensors whose name the filter fits."""

    filter: str | None
    """None or `*`: every tensor. Else a substring of the name, or where globs are on and it has `*` or `?`, a glob."""
    values: tuple[Scalar, ...]
    """One value, or a gradient. Empty: no value, the next level is asked."""


@dataclass(frozen=True, slots=True)
class Setting:
    """The rules of one setting at one level of a recipe; the first rule that fits wins."""

    rules: tuple[Rule, ...]
    globs: bool = False
    """Whether `*` and `?` in a filter are wildcards (our recipes) or plain characters (mergekit's)."""

    def at(self, tensor: str, position: Position) -> Scalar | None:
        """Return the value for a tensor, or None where no rule fits or the rule that does is empty."""
        for rule in self.rules:
            if self.fits(rule.filter, tensor):
                return interpolate(rule.values, position) if rule.values else None
        return None

    def scalars(self) -> tuple[Scalar, ...]:
        """Return every value that the setting could be built from."""
        return tuple(value for rule in self.rules for value in rule.values)

    def fits(self, pattern: str | None, tensor: str) -> bool:
        """Return whether a filter of this setting fits a tensor's name."""
        if pattern is None or pattern == "*":
            return True
        if self.globs and any(sign in pattern for sign in "*?"):
            return fnmatch.fnmatchcase(tensor, pattern)
        return pattern in tensor


def interpolate(values: tuple[Scalar, ...], position: Position) -> Scalar:
    """Return the value of a list at a depth.

    Numbers are joined by straight lines; of other values the last one at or before the depth is taken.

    >>> interpolate((0.0, 0.5, 1.0, 0.2), Position(1, 8))
    0.21428571428571427

    Args:
        values: At least one; spread evenly from depth 0 to depth 1.
        position: The layer. The place `p (m - 1)` in the list is computed in whole numbers, so that a depth that falls
            on an element takes that element and not, by a rounding of `p`, the one before.
    """
    last = position.count - 1
    if last <= 0 or len(values) == 1:
        return values[-1]
    element, rest = divmod(position.index * (len(values) - 1), last)
    low = values[element]
    if rest == 0 or isinstance(low, (bool, str)):
        return low
    high = values[element + 1]
    if isinstance(high, (bool, str)):
        return low
    fraction = rest / last
    return (1.0 - fraction) * low + fraction * high


def first_value(levels: Iterable[Mapping[str, Setting]], name: str, tensor: str, position: Position) -> Scalar | None:
    """Return the value of the first level that yields one, or None.

    Args:
        levels: From the most specific (source, slice, module, top) to the most general.
        name: The setting.
        tensor: The name that filters are compared with.
        position: The layer's place in its slice.
    """
    for level in levels:
        setting = level.get(name)
        value = None if setting is None else setting.at(tensor, position)
        if value is not None:
            return value
    return None


def read_setting(where: str, raw: object) -> Setting:
    """Return a mergekit setting: a scalar, a list over depth, one `{filter, value}`, or a list of those.

    Args:
        where: The setting's place in the file, for error texts.
        raw: What the YAML holds.

    Raises:
        ConfigError: It is none of these.
    """
    if isinstance(raw, Mapping):
        return Setting((_read_rule(where, raw),))
    if isinstance(raw, list) and any(isinstance(one, Mapping) for one in raw):
        return Setting(tuple(_read_rule(f"{where}[{index}]", one) for index, one in enumerate(raw)))
    return Setting((Rule(None, _read_values(where, raw)),))


def read_flat_setting(where: str, raw: object) -> Setting:
    """Return a setting of our recipes: a scalar, a list over depth, or a list of `filter: value`.

    Raises:
        ConfigError: It is none of these.
    """
    if not (isinstance(raw, list) and any(isinstance(one, Mapping) for one in raw)):
        return Setting((Rule(None, _read_values(where, raw)),), globs=True)
    rules = []
    for index, one in enumerate(raw):
        if not isinstance(one, Mapping) or len(one) != 1:
            raise ConfigError(
                f"{where}: rule {index + 1} is not one filter with its value.",
                expected="a list of single pairs, e.g. [{mlp: 0.3}, {'*': 0.5}]",
                found=repr(one),
                fix="write one '- filter: value' per line",
            )
        ((pattern, value),) = one.items()
        rules.append(Rule(str(pattern), _read_values(f"{where}[{index}]", value)))
    return Setting(tuple(rules), globs=True)


def _read_rule(where: str, raw: object) -> Rule:
    if not isinstance(raw, Mapping) or "value" not in raw or set(raw) - {"filter", "value"}:
        raise ConfigError(
            f"{where}: not a rule.",
            expected="{filter: part of a tensor's name, value: a number or a list}, the filter optional",
            found=repr(raw),
            fix="give every entry of the list a 'value', and no other keys than 'filter' and 'value'",
        )
    pattern = raw.get("filter")
    if pattern is not None and not isinstance(pattern, str):
        raise ConfigError(
            f"{where}: the filter is not text.",
            expected="part of a tensor's name",
            found=repr(pattern),
            fix="quote it",
        )
    return Rule(pattern, _read_values(where, raw["value"]))


def _read_values(where: str, raw: object) -> tuple[Scalar, ...]:
    items = raw if isinstance(raw, list) else [raw]
    values = tuple(_read_scalar(where, item) for item in items)
    if len({_family(value) for value in values}) > 1:
        raise ConfigError(
            f"{where}: the list mixes kinds of values.",
            expected="numbers only, true/false only, or words only",
            found=repr(raw),
            fix="write values of one kind",
        )
    return values


def _read_scalar(where: str, raw: object) -> Scalar:
    if isinstance(raw, bool):
        return raw
    if isinstance(raw, (int, float)):
        number = _as_float(raw)
    elif isinstance(raw, str):
        # YAML 1.1 reads 1e-4 as text; people mean the number.
        try:
            number = float(raw)
        except ValueError:
            return raw
    else:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(
            f"{where}: not a value.",
            expected="a finite number, true, false, a word, or a list of one of these",
            found=repr(raw),
            fix="write a number, or remove the setting",
        )
    return number


def _as_float(raw: float) -> float:
    try:
        return float(raw)
    except OverflowError:
        return math.inf


def _family(value: Scalar) -> str:
    return "flag" if isinstance(value, bool) else "word" if isinstance(value, str) else "number"
