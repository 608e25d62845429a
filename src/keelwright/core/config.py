# SPDX-License-Identifier: Apache-2.0
"""Frozen-dataclass configs: built from plain mappings, unknown keys refused, ranges checked."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from keelwright.core.errors import ConfigError

C = TypeVar("C")


def config_from_mapping(kind: type[C], values: Mapping[str, object], *, where: str) -> C:
    """Build the frozen dataclass `kind` from a flat mapping.

    Args:
        kind: The config class. Every field has a default or must be present.
        values: Field names to plain values, as a recipe or a command line gives them.
        where: Where the values came from, for error texts (`recipe.yaml`, `command line`).

    Returns:
        The config, after its own validation.

    Raises:
        ConfigError: A key is unknown (the nearest spelling is offered), missing, or of the wrong type.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise ConfigError(
                f"{where}: {kind.__name__} has no setting '{key}'.",
                expected=f"one of {', '.join(fields)}",
                found=key,
                fix=nearest(key, fields),
            )
    hints = typing.get_type_hints(kind)
    for name, field in fields.items():
        if name in values:
            _require_type(where, name, values[name], hints[name])
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(
                f"{where}: {kind.__name__} needs the setting '{name}'.",
                expected=f"{name}: {_type_name(hints[name])}",
                found="nothing",
                fix=f"add '{name}'",
            )
    return kind(**values)


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return advice that names the closest of `choices`, for the `fix` line of an error."""
    known = sorted(choices)
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean '{close[0]}'?" if close else f"choose one of: {', '.join(known)}"


def require_in_range(
    name: str,
    value: float,
    *,
    low: float = float("-inf"),
    high: float = float("inf"),
    low_open: bool = False,
    high_open: bool = False,
) -> None:
    """Raise `ConfigError` unless `value` lies in the interval from `low` to `high`.

    Args:
        name: The setting's name.
        value: Its value; NaN is always refused.
        low, high: Ends of the interval.
        low_open, high_open: Whether that end is itself excluded.
    """
    above = value > low if low_open else value >= low
    below = value < high if high_open else value <= high
    if not (above and below):
        interval = f"{'(' if low_open else '['}{low:g}, {high:g}{')' if high_open else ']'}"
        raise ConfigError(
            f"'{name}' is out of range.",
            expected=f"a number in {interval}",
            found=f"{value:g}",
            fix=f"set '{name}' inside {interval}",
        )


def require_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise `ConfigError` unless `value` is one of `choices`."""
    known = list(choices)
    if value not in known:
        raise ConfigError(
            f"'{name}' is not a known choice.",
            expected=f"one of {', '.join(known)}",
            found=value,
            fix=nearest(value, known),
        )


def config_to_mapping(config: object) -> dict[str, Any]:
    """Return the config's fields as plain values, for `run.json` and reports."""
    return dataclasses.asdict(config)  # type: ignore[call-overload]


def _require_type(where: str, name: str, value: object, hint: Any) -> None:
    if not _is_instance(value, hint):
        raise ConfigError(
            f"{where}: '{name}' has the wrong type.",
            expected=_type_name(hint),
            found=f"{value!r} ({type(value).__name__})",
            fix=f"write a {_type_name(hint)}",
        )


def _is_instance(value: object, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_is_instance(value, option) for option in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is tuple and isinstance(value, tuple):
        kinds = [one for one in typing.get_args(hint) if one is not Ellipsis]
        wanted = kinds * len(value) if len(kinds) == 1 else kinds
        return len(wanted) == len(value) and all(map(_is_instance, value, wanted))
    kind = origin or hint
    return isinstance(value, kind) if isinstance(kind, type) else True


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
