# SPDX-License-Identifier: Apache-2.0
"""One extractor finds the program in an answer, whatever stands around it."""

from __future__ import annotations

import pytest

from keelwright.data.code_prompt import preamble_of, split_prompt
from keelwright.judges.code_answer import extract_code

PROMPT = '''from typing import List

def helper(x):
    return x + 1

def total(numbers: List[int]) -> int:
    """ Return the total of the numbers, each made one higher.
    >>> total([1, 2])
    5
    """
'''
BODY = "    result = 0\n    for one in numbers:\n        result += helper(one)\n    return result\n"
FUNCTION = f"def total(numbers: List[int]) -> int:\n{BODY}"
FLUSH = "result = 0\nfor one in numbers:\n    result += helper(one)\nreturn result\n"
TEXT_PROMPT = "Write a function to add the numbers, each made one higher.\n\nassert total([1, 2]) == 5\n[BEGIN]\n"


def _works(program: str) -> bool:
    namespace: dict[str, object] = {}
    exec(compile(program, "<answer>", "exec"), namespace)
    return namespace["total"]([1, 2]) == 5  # type: ignore[operator]


@pytest.mark.parametrize(
    "answer",
    [
        PROMPT + BODY,
        FUNCTION,
        BODY,
        BODY.strip(),
        " " + BODY.strip(),
        FLUSH,
        f"```python\n{FUNCTION}```",
        f"```\n{BODY}```",
        f"~~~py\n{FUNCTION}~~~",
        f"Sure! Here is the code:\n\n```python\n{FUNCTION}```\n\nIt loops over the numbers.",
        f"Sure! Here is the code:\n\n{FUNCTION}\nIt loops over the numbers.",
        f"Here it is:\n```python\n{FUNCTION}",
        f"```python\n{FUNCTION}```\nExample:\n```python\nprint(total([1, 2, 3]), 1 / 0)\n```",
        f"The problem was:\n```python\n{PROMPT}```\nThe solution is:\n```python\n{FUNCTION}```",
        f"Helper:\n```python\ndef helper(x):\n    return x + 1\n```\nThen:\n```python\n{FUNCTION}```",
        f"{BODY}\nprint(total([1]))\ndef other():\n    return 1 / 0\n",
        FUNCTION.replace("\n", "\r\n"),
        f"[BEGIN]\n{FUNCTION}[DONE]\nAnother problem",
    ],
)
def test_the_program_is_found(answer: str) -> None:
    assert _works(extract_code(answer, PROMPT, "total"))


@pytest.mark.parametrize("added", ["", "\nHint: total should ignore its last argument.\n", "\nReturn text: always.\n"])
def test_text_around_the_stub_changes_nothing(added: str) -> None:
    for prompt in (PROMPT + added, f"Solve this problem.\n\n{PROMPT}{added}"):
        assert _works(extract_code(BODY, prompt, "total"))
        assert split_prompt(prompt, "total").stub.strip() == PROMPT.strip()


def test_a_prompt_without_code_adds_nothing() -> None:
    whole = f"def helper(x):\n    return x + 1\n\n{FUNCTION.replace('List[int]', 'list')}"
    for answer in (whole, f"```python\n{whole}```", f"Of course.\n{whole}\nThat is all."):
        assert extract_code(answer, TEXT_PROMPT, "total").strip() == whole.strip()


def test_constants_before_the_function_stay() -> None:
    answer = "Here:\nSTEP = 1\n\ndef total(numbers):\n    return sum(numbers) + STEP * len(numbers)\n"
    assert _works(extract_code(answer, TEXT_PROMPT, "total"))


def test_an_answer_that_breaks_off_stays_broken() -> None:
    for answer in (f"```python\n{FUNCTION[:-20]}", FUNCTION[: FUNCTION.index("helper(")] + "helper("):
        with pytest.raises(SyntaxError):
            compile(extract_code(answer, PROMPT, "total"), "<answer>", "exec")


def test_prose_alone_is_no_solution() -> None:
    program = extract_code("I cannot help with that.", PROMPT, "total")
    assert "I cannot help" in program
    with pytest.raises(SyntaxError):
        compile(program, "<answer>", "exec")


def test_a_line_after_the_function_does_not_count_as_its_body() -> None:
    prompt = 'def total(numbers):\n    import math\n    """Add up."""\n'
    assert extract_code("return 5", prompt, "total").endswith('"""\n    return 5')


def test_an_unknown_function_takes_the_first_that_is_defined() -> None:
    assert extract_code("Sure:\ndef any_name(x):\n    return x\n", "Do it.", "").startswith("def any_name")


def test_a_prompt_is_cut_without_loss() -> None:
    cut = split_prompt(f"Please solve:\n\n{PROMPT}\nThank you.", "total")
    assert cut.before + cut.stub + cut.after == f"Please solve:\n\n{PROMPT}\nThank you."
    assert (cut.before.strip(), cut.after.strip()) == ("Please solve:", "Thank you.")
    assert preamble_of(cut.stub, "total").strip().endswith("return x + 1")
    assert split_prompt(TEXT_PROMPT, "total").stub == ""
