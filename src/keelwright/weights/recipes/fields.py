# SPDX-License-Identifier: Apache-2.0
"""Checks that both readers share: keys, texts, dtypes, whole numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from keelwright.core.config import nearest
from keelwright.core.errors import ConfigError

_DTYPES: Final = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}


def require_known(where: str, found: Iterable[object], known: Iterable[str]) -> None:
    """Raise `ConfigError` at the first key that is not known, with the nearest spelling."""
    names = list(known)
    for key in found:
        if key not in names:
            raise ConfigError(
                f"{where}: unknown key '{key}'.",
                expected=f"keys out of {', '.join(names)}",
                found=str(key),
                fix=nearest(str(key), names),
            )


def as_mapping(where: str, raw: object) -> Mapping[str, Any]:
    """Return `raw` where it is a mapping; nothing counts as an empty one."""
    if raw is None:
        return {}
    if not isinstance(raw, Mapping):
        raise _wrong(where, "keys with values", raw)
    return raw


def as_list(where: str, raw: object) -> list[Any]:
    """Return `raw` where it is a list with something in it."""
    if not isinstance(raw, list) or not raw:
        raise _wrong(where, "a list with at least one entry", raw)
    return raw


def as_text(where: str, raw: object) -> str:
    """Return `raw` where it is text."""
    if not isinstance(raw, str) or not raw.strip():
        raise _wrong(where, "text", raw)
    return raw.strip()


def as_count(where: str, raw: object, *, low: int) -> int:
    """Return `raw` where it is a whole number of at least `low`."""
    if isinstance(raw, bool) or not isinstance(raw, int) or raw < low:
        raise _wrong(where, f"a whole number, {low} or more", raw)
    return raw


def as_dtype(where: str, raw: object) -> str:
    """Return the safetensors name of a floating dtype, written with or without `torch.`."""
    name = as_text(where, raw).removeprefix("torch.")
    if name not in _DTYPES:
        raise ConfigError(
            f"{where}: weights cannot be merged in '{name}'.",
            expected=f"one of {', '.join(_DTYPES)}",
            found=name,
            fix=nearest(name, _DTYPES),
        )
    return _DTYPES[name]


def _wrong(where: str, expected: str, raw: object) -> ConfigError:
    found = "nothing" if raw is None else f"{raw!r} ({type(raw).__name__})"
    return ConfigError(f"{where}: not what belongs there.", expected=expected, found=found, fix=f"write {expected}")
