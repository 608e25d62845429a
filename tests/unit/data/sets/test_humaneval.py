# SPDX-License-Identifier: Apache-2.0
"""HumanEval: programs that pass are answer, setup, tests."""

from __future__ import annotations

import pytest

from keelwright.core.errors import DataError
from keelwright.data.sets.humaneval import read_humaneval

ROW = {
    "task_id": "HumanEval/7",
    "prompt": 'def double(x):\n    """Twice x."""\n',
    "entry_point": "double",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    ran.append(candidate)\n",
}


def test_the_known_solution_passes_its_tests_and_they_do_run(rows) -> None:
    (item,) = read_humaneval(rows(ROW))
    assert (item.item_id, item.kind, item.scorer, item.prompt) == ("humaneval/7", "task", "tests", ROW["prompt"])
    ran: list[object] = []
    program = "\n".join(item.materials[part] for part in ("canonical", "setup", "tests"))
    exec(program, {"ran": ran})
    assert len(ran) == 1
    with pytest.raises(AssertionError):
        exec(program.replace("2 * x", "x"), {"ran": ran})


def test_a_problem_without_tests_is_refused(rows) -> None:
    with pytest.raises(DataError, match="line 2 is malformed"):
        read_humaneval(rows({**ROW, "test": ""}))


def test_the_published_file_has_the_published_count(published) -> None:
    """164 problems: arXiv 2107.03374, section 2.2."""
    items = published("humaneval").items
    assert [item.item_id for item in items] == [f"humaneval/{number}" for number in range(164)]
    assert all(f"def {item.materials['entry_point']}" in item.prompt for item in items)
