# SPDX-License-Identifier: Apache-2.0
"""Code answers are judged by running their tests."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest

from keelwright.core.errors import DataError
from keelwright.core.records import Generation, Item
from keelwright.data.sets.humaneval import read_humaneval
from keelwright.data.sets.mbpp import read_mbpp
from keelwright.data.source_rows import read_rows
from keelwright.judges.code_tests import CodeTestsJudge, program_of
from keelwright.judges.registry import JudgeContext, find_judge
from keelwright.judges.sandbox.runner import Limits, run_many

MATERIALS = {
    "tests": "assert double(2) == 4\nassert double(Box(3)) == 6\n",
    "setup": "class Box(int):\n    pass\n",
    "entry_point": "double",
}


def _item(materials: Mapping[str, str] = MATERIALS) -> Item:
    return Item("one", "test", "task", "code", "Double a number.", scorer="tests", materials=materials)


def _said(output: str, finish: str = "eos") -> Generation:
    return Generation("one", output, 1, finish)  # type: ignore[arg-type]


def test_every_outcome_has_its_verdict() -> None:
    answers = [
        _said("def double(x):\n    return 2 * x"),
        _said("```python\ndef double(x):\n    return x\n```"),
        _said("def double(x: return"),
        _said("def double(x):\n    while True:\n        pass"),
        _said("import os\ndef double(x):\n    os._exit(0)"),
        _said("def double(x):\n    return open('/tmp/keelwright-escaped', 'w')"),
        _said("def double(x):\n    return bytes(1 << 40)"),
        _said("", finish="error"),
    ]
    judge = CodeTestsJudge(Limits(timeout_s=0.5), workers=2)
    verdicts = judge.judge_all([(_item(), one) for one in answers])
    assert [(one.label, one.score, one.raw) for one in verdicts] == [
        ("correct", 1.0, "passed"),
        ("wrong", 0.0, "failed"),
        ("wrong", 0.0, "syntax error"),
        ("wrong", 0.0, "timeout"),
        ("wrong", 0.0, "failed"),
        ("wrong", 0.0, "escaped"),
        ("wrong", 0.0, "limit"),
        ("error", None, "no output"),
    ]
    assert judge.judge(_item(), answers[0]) == verdicts[0]
    assert judge.judge_all([]) == []


def test_the_judge_is_found_by_name_and_sends_nothing_away() -> None:
    judge = find_judge("unit-tests", JudgeContext())
    assert (judge.judge_id, getattr(judge, "network", "")) == ("unit-tests@1", None)


@pytest.mark.parametrize("tests", ["", "assert double(2 == 4"])
def test_an_item_without_tests_is_an_error(tests: str) -> None:
    with pytest.raises(DataError, match="Item 'one' has no unit tests to run"):
        CodeTestsJudge().judge(_item({**MATERIALS, "tests": tests}), _said("x = 1"))


def test_setup_comes_after_the_program_and_before_the_tests() -> None:
    program = program_of(_item(), "class Box:\n    pass\ndef double(x):\n    return 2 * x")
    assert program.source.startswith("class Box")
    assert program.tests.index("class Box(int)") < program.tests.index("assert")


@pytest.mark.slow
@pytest.mark.skipif("KEELWRIGHT_DATA" not in os.environ, reason="the canonical solutions are in the shared data sets")
def test_every_canonical_solution_passes_its_own_tests() -> None:
    """164 of HumanEval (arXiv 2107.03374) and 974 of MBPP (arXiv 2108.07732), without exception on Python 3.11."""
    data = Path(os.environ["KEELWRIGHT_DATA"])
    items = [
        *read_humaneval(read_rows(data / "humaneval" / "HumanEval.jsonl.gz")),
        *read_mbpp(read_rows(data / "mbpp" / "mbpp.jsonl")),
    ]
    runs = run_many([program_of(item, item.materials["canonical"]) for item in items], limits=Limits(timeout_s=60.0))
    failed = [(item.item_id, run) for item, run in zip(items, runs, strict=True) if run.outcome != "passed"]
    assert failed == []
    assert Counter(item.suite for item in items) == {"humaneval": 164, "mbpp": 974}


@pytest.mark.slow
@pytest.mark.skipif("KEELWRIGHT_DATA" not in os.environ, reason="the problems are in the shared data sets")
def test_problems_without_a_solution_fail() -> None:
    items = read_humaneval(read_rows(Path(os.environ["KEELWRIGHT_DATA"]) / "humaneval" / "HumanEval.jsonl.gz"))
    runs = run_many([program_of(item, "    return None\n") for item in items])
    assert {run.outcome for run in runs} == {"failed"}
