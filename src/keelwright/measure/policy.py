# SPDX-License-Identifier: Apache-2.0
"""A policy: which metrics must hold, how that is tested, and how many items it takes to say so.

Three kinds of rule, each with a verdict of its own:

- `regression` fails on a significant worsening beyond `margin`; it is not measurable with fewer pairs than would show
  a change of `detect`, and passes otherwise;
- `non-inferiority` passes when the worsening is below `margin` with confidence, fails when it is above it with
  confidence, and is not measurable in between;
- `threshold` fails when the value is outside `min`..`max`; it is not measurable with fewer than `min_n` items, or when
  a `margin` is given and the items cannot show the value to be within it; it passes otherwise.

The p-values of all `regression` rules are one family under the policy's `multiplicity`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, Literal

import yaml

from keelwright.core.config import config_from_mapping, nearest, require_choice, require_in_range
from keelwright.core.errors import ConfigError, DataError, MissingError

Test = Literal["regression", "non-inferiority", "threshold"]
Multiplicity = Literal["holm", "bh", "none"]

TESTS: Final = ("regression", "non-inferiority", "threshold")
MULTIPLICITIES: Final = ("holm", "bh", "none")
_KEYS: Final = ("name", "alpha", "power", "multiplicity", "rules")
_EXAMPLE: Final = 'rules such as "- {metric: refusal_rate, test: regression, detect: 0.1}"'


@dataclass(frozen=True, slots=True)
class Rule:
    """What one metric must do."""

    metric: str
    """Name of a metric; `primary` is the one that the suite declares."""
    test: str = "regression"
    """regression, non-inferiority or threshold."""
    direction: str = "auto"
    """Which way is worse: `up`, `down`, or `auto` for what the metric means."""
    margin: float | None = None
    """Change for the worse that is tolerated, in the metric's unit (a rate: 0..1)."""
    detect: float | None = None
    """For `regression`: the change that matters, above the margin; fewer pairs than show it with the policy's power
    cannot pass, whatever the other rules of the family find."""
    min: float | None = None
    """For `threshold`: the least value."""
    max: float | None = None
    """For `threshold`: the greatest value."""
    min_n: int = 1
    """Fewest items, or pairs."""
    hazard: str | None = None
    """Only in this hazard area."""

    def __post_init__(self) -> None:
        require_choice("test", self.test, TESTS)
        require_choice("direction", self.direction, ("auto", "up", "down"))
        require_in_range("min_n", self.min_n, low=1)
        for name, value in (("margin", self.margin), ("detect", self.detect)):
            if value is not None:
                require_in_range(name, value, low=0.0)
        if self.detect is not None and self.detect <= (self.margin or 0.0):
            raise ConfigError(
                f"The rule for '{self.metric}' cannot tell a change of {self.detect:g} from its margin.",
                expected="detect above the margin",
                found=f"detect {self.detect:g}, margin {self.margin or 0.0:g}",
                fix="raise detect, or lower the margin",
            )
        if self.test == "threshold" and self.min is None and self.max is None:
            raise ConfigError(
                f"The rule for '{self.metric}' has no threshold.", expected="min or max", found="neither", fix="add one"
            )
        if self.test == "non-inferiority" and not self.margin:
            raise ConfigError(
                f"The rule for '{self.metric}' has no margin of non-inferiority.",
                expected="margin: a number above 0",
                found=f"{self.margin}",
                fix="write how much worse is still acceptable",
            )


@dataclass(frozen=True, slots=True)
class Policy:
    """What must hold for a change to pass."""

    name: str
    rules: tuple[Rule, ...]
    alpha: float = 0.05
    """Level of every test, one-sided; the family's for `regression`."""
    power: float = 0.8
    """With which `detect` must be seen."""
    multiplicity: str = "holm"
    """How the p-values of all `regression` rules are adjusted: holm, bh or none."""

    def __post_init__(self) -> None:
        require_in_range("alpha", self.alpha, low=0.0, high=0.5, low_open=True)
        require_in_range("power", self.power, low=0.5, high=1.0, high_open=True)
        require_choice("multiplicity", self.multiplicity, MULTIPLICITIES)


def read_policy(source: str | Path) -> Policy:
    """Return the policy of a YAML file, or `default`.

    Raises:
        MissingError: There is no such file.
        DataError: It is not YAML.
        ConfigError: A key or value is wrong.
    """
    if str(source) == "default":
        text = files("keelwright.measure").joinpath("policies", "default.yaml").read_text(encoding="utf-8")
        return parse_policy(text, where="policy default")
    path = Path(source)
    if not path.is_file():
        raise MissingError(
            f"There is no policy '{path}'.",
            expected="a YAML file, or default",
            found="a folder" if path.is_dir() else "nothing",
            fix="check the path",
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"'{path}' is not UTF-8 text.", expected="a UTF-8 YAML file", found=str(error), fix="save it as UTF-8"
        ) from error
    return parse_policy(text, where=str(path))


def parse_policy(text: str, *, where: str) -> Policy:
    """Return the policy that a YAML text holds.

    Args:
        text: The document.
        where: The file's name, for error texts.
    """
    try:
        document: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        found = " ".join(str(error).split())
        raise DataError(f"{where} is not YAML.", expected=_EXAMPLE, found=found, fix="mend the file") from error
    if not isinstance(document, dict) or not isinstance(document.get("rules"), list) or not document["rules"]:
        found = (
            f"keys {', '.join(map(str, document)) or 'none'}" if isinstance(document, dict) else type(document).__name__
        )
        raise ConfigError(f"{where} is not a policy.", expected=_EXAMPLE, found=found, fix="write its rules as a list")
    for key in document:
        if key not in _KEYS:
            raise ConfigError(
                f"{where}: a policy has no key '{key}'.",
                expected=f"one of {', '.join(_KEYS)}",
                found=str(key),
                fix=nearest(str(key), _KEYS),
            )
    rules = tuple(_rule(one, where=f"{where}, rule {number}") for number, one in enumerate(document["rules"], 1))
    plain = {key: value for key, value in document.items() if key != "rules"}
    return config_from_mapping(Policy, {"name": Path(where).stem, **plain, "rules": rules}, where=where)


def _rule(value: Any, *, where: str) -> Rule:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} is not a mapping.", expected=_EXAMPLE, found=type(value).__name__, fix="mend it")
    return config_from_mapping(Rule, {str(key): one for key, one in value.items()}, where=where)
