# SPDX-License-Identifier: Apache-2.0
"""The judge `unit-tests@1`: a program is right when its item's tests run to their end.

The program is what `judges.code_answer` makes of the answer; it runs apart from this process, as
`judges.sandbox.runner` says. The verdict's words are the run's outcome: `passed`, `failed`, `syntax error`, `timeout`,
`limit` or `escaped`. Time-outs are failures, but depend on the machine's load; they are counted apart.

Limits: tests say what they test. An answer whose objects claim to equal anything passes; HumanEval's own tests are
weak. Programs have the standard library alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from keelwright.core.errors import DataError
from keelwright.core.records import Generation, Item, Judgement
from keelwright.data.code_prompt import parsed
from keelwright.judges.code_answer import extract_code
from keelwright.judges.sandbox.runner import Limits, Program, TestRun, run_many

SCORER: Final = "tests"


class CodeTestsJudge:
    """Runs code answers against their items' tests; meets `core.protocols.BatchJudge`.

    Args:
        limits: What one program may use.
        workers: Programs at a time; None takes one per core.
    """

    judge_id = "unit-tests@1"
    network: str | None = None

    def __init__(self, limits: Limits | None = None, *, workers: int | None = None) -> None:
        self._limits = limits or Limits()
        self._workers = workers

    def judge(self, item: Item, generation: Generation) -> Judgement:
        """Return `correct` with score 1 or `wrong` with score 0; `error` where there is no output.

        Raises:
            DataError: The item has no tests, or they are not Python.
            MissingError, ResourceError: Programs cannot be run on this machine.
        """
        return self.judge_all([(item, generation)])[0]

    def judge_all(self, answers: Sequence[tuple[Item, Generation]]) -> list[Judgement]:
        """Return one judgement per answer, in order; several programs run at a time.

        Raises:
            DataError: An item has no tests, or they are not Python.
            MissingError, ResourceError: Programs cannot be run on this machine.
        """
        programs = {
            index: program_of(item, generation.output)
            for index, (item, generation) in enumerate(answers)
            if generation.finish != "error"
        }
        runs = run_many(list(programs.values()), workers=self._workers, limits=self._limits) if programs else []
        verdicts = dict(zip(programs, map(_judgement, runs), strict=True))
        return [verdicts.get(index, Judgement("error", raw="no output")) for index in range(len(answers))]


def program_of(item: Item, answer: str) -> Program:
    """Return an answer as a program with its item's setup and tests.

    Args:
        item: Materials `tests`, and perhaps `setup` and `entry_point`.
        answer: The model's words.

    Raises:
        DataError: The item has no tests, or they are not Python.
    """
    tests = item.materials.get("tests", "")
    setup = item.materials.get("setup", "")
    if not tests.strip() or parsed(f"{setup}\n{tests}") is None:
        raise DataError(
            f"Item '{item.item_id}' has no unit tests to run.",
            expected="an item with the scorer 'tests' and Python under materials['tests']",
            found="text that is not Python" if tests.strip() else "none",
            fix="judge code items with this judge, and others with another",
        )
    source = extract_code(answer, item.prompt, item.materials.get("entry_point", ""))
    return Program(source, f"{setup}\n{tests}")


def _judgement(run: TestRun) -> Judgement:
    passed = run.outcome == "passed"
    return Judgement("correct" if passed else "wrong", score=float(passed), raw=run.outcome.replace("_", " "))
