# SPDX-License-Identifier: Apache-2.0
"""The error tree. Each error says what was expected, what was found and what to do next.

    KeelwrightError
    |-- exit 2, what was given is wrong
    |   |-- ConfigError          a setting, a flag or a recipe key
    |   |-- DataError            a row, a file of rows, a text
    |   |-- ModelMismatchError   two models that do not fit together
    |   |-- UnsafeInputError     pickled weights, paths that leave their folder
    |   `-- NumericalError       NaN or infinity where numbers belong
    |-- exit 3, the machine lacks something
    |   |-- MissingError         a file, a hub id, an optional package
    |   |-- OfflineError         the network is needed and not available
    |   |-- StorageError         disk full, read-only, output folder in use
    |   `-- ResourceError        too little memory for the plan
    `-- exit 4
        `-- GateFailed           a policy was not met

Only the command line catches them; it prints the text and leaves with `exit_code`.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum


class ExitCode(IntEnum):
    """What a command's exit status means."""

    DONE = 0
    BUG = 1
    BAD_INPUT = 2
    MACHINE = 3
    GATE_FAILED = 4
    NOT_REPAIRED = 5
    NOT_MEASURABLE = 6
    INTERRUPTED = 130


class KeelwrightError(Exception):
    """Base of every error that a user can act on.

    Args:
        problem: One sentence saying what is wrong, with the name of the thing.
        expected: What would have been right.
        found: What was there instead.
        fix: What to do next.
    """

    exit_code: ExitCode = ExitCode.BAD_INPUT

    def __init__(
        self,
        problem: str,
        *,
        expected: str | None = None,
        found: str | None = None,
        fix: str | None = None,
    ) -> None:
        super().__init__(problem)
        self.problem = problem
        self.expected = expected
        self.found = found
        self.fix = fix

    def __reduce__(self) -> tuple[Callable[..., KeelwrightError], tuple[object, ...]]:
        # An error of a worker process travels whole.
        return (_rebuilt, (type(self), self.problem, self.expected, self.found, self.fix))

    def __str__(self) -> str:
        details = (("expected", self.expected), ("found", self.found), ("fix", self.fix))
        lines = [f"  {name + ':':<9} {text}" for name, text in details if text is not None]
        return "\n".join([self.problem, *lines])


def _rebuilt(
    kind: type[KeelwrightError], problem: str, expected: str | None, found: str | None, fix: str | None
) -> KeelwrightError:
    return kind(problem, expected=expected, found=found, fix=fix)


class ConfigError(KeelwrightError):
    """A setting, a flag or a recipe key is wrong."""


class DataError(KeelwrightError):
    """A row, a file of rows or a text cannot be used."""


class ModelMismatchError(KeelwrightError):
    """Two models do not fit together."""


class UnsafeInputError(KeelwrightError):
    """The input could run code or reach outside its folder."""


class NumericalError(KeelwrightError):
    """NaN or infinity where a number belongs."""


class MissingError(KeelwrightError):
    """A file, a hub id or an optional package is not there."""

    exit_code = ExitCode.MACHINE


class OfflineError(KeelwrightError):
    """The network is needed and was not allowed or not reachable."""

    exit_code = ExitCode.MACHINE


class StorageError(KeelwrightError):
    """The disk is full or read-only, or the output folder is in use."""

    exit_code = ExitCode.MACHINE


class ResourceError(KeelwrightError):
    """The plan needs more memory than the machine has."""

    exit_code = ExitCode.MACHINE


class GateFailed(KeelwrightError):
    """A policy was not met."""

    exit_code = ExitCode.GATE_FAILED
