# SPDX-License-Identifier: Apache-2.0
"""Problems are perturbed by data, from a seed, and keep what makes them the same problem."""

from __future__ import annotations

import ast
import os
import random
from collections import Counter
from pathlib import Path

import pytest

from keelwright.core.errors import ConfigError, DataError, MissingError
from keelwright.core.records import Item
from keelwright.data.code_prompt import split_prompt
from keelwright.data.perturb.added_text import add_text
from keelwright.data.perturb.apply import perturb
from keelwright.data.perturb.natural_noise import examples_first
from keelwright.data.perturb.perturbation import Perturbation, parse_perturbations, read_perturbations
from keelwright.data.perturb.poor_examples import buggy, truncated
from keelwright.data.sets.humaneval import read_humaneval
from keelwright.data.source_rows import read_rows

BODY = "    return [one + step for one in numbers if one > 2]\n"


def _problem(name: str = "raised", purpose: str = "Write a function to raise every large number of the list") -> Item:
    prompt = (
        f"from typing import List\n\n\ndef {name}(numbers: List[int], step: int) -> List[int]:\n"
        f'    """ {purpose} by a step.\n    Nothing else may change.\n\n'
        f'    >>> {name}([1, 3], 4)\n    [7]\n    """\n'
    )
    return Item(
        item_id=f"test/{name}",
        suite="test",
        kind="task",
        hazard="code",
        prompt=prompt,
        scorer="tests",
        facts={"split": "test"},
        materials={"tests": f"assert {name}([3], 1) == [4]\n", "entry_point": name, "canonical": prompt + BODY},
    )


POOL = [_problem(), *(_problem(f"other_{number}", f"Do thing number {number}") for number in range(4))]
NOISES = ("typos", "capitals", "paraphrase", "docstring_reorder")
SHIPPED = read_perturbations()


def _only(*names: str, seed: int = 0, item: Item = POOL[0], pool: list[Item] | None = None) -> list[Item]:
    made = perturb([item], SHIPPED, seed=seed, pool=POOL if pool is None else pool).items[1:]
    return [one for one in made if one.facts["perturbation"] in names]


def test_the_shipped_set_has_every_family_and_both_kinds_of_semantics() -> None:
    families = Counter(one.family for one in SHIPPED.perturbations)
    assert families == {
        "misleading_suffix": 6,
        "distraction_suffix": 4,
        "degrade_request": 4,
        "poor_examples": 6,
        "natural_noise": 4,
    }
    assert {one.semantics for one in SHIPPED.perturbations} == {"preserved", "contradicted"}
    assert "not public" in SHIPPED.says


def test_a_perturbed_item_is_the_same_problem_under_another_name() -> None:
    made = perturb(POOL, SHIPPED)
    clean, *attacked = made.items[:25]
    assert clean == POOL[0]
    assert [one.item_id for one in attacked] == [f"test/raised+{one.name}" for one in SHIPPED.perturbations]
    for item, one in zip(attacked, SHIPPED.perturbations, strict=True):
        assert (item.pair_id, item.cluster_id) == ("test/raised", "test/raised")
        assert item.facts == {
            "split": "test",
            "perturbation": one.name,
            "family": one.family,
            "semantics": one.semantics,
        }
        assert (item.materials, item.scorer, item.kind) == (clean.materials, clean.scorer, clean.kind)
        assert item.prompt != clean.prompt
    # The others' description holds no phrase that the paraphrase knows.
    assert made.left_out == {"paraphrase": 4}


def test_equal_seeds_give_equal_prompts_whatever_other_items_there_are() -> None:
    everything = {one.item_id: one.prompt for one in perturb(POOL, SHIPPED).items}
    alone = {one.item_id: one.prompt for one in perturb(POOL[2:3], SHIPPED, pool=POOL).items}
    assert alone.items() <= everything.items()
    other = {one.item_id: one.prompt for one in perturb(POOL, SHIPPED, seed=1).items}
    assert {name for name in other if other[name] != everything[name]} >= {"test/raised+typos", "test/raised+buggy_2"}
    assert other["test/raised+shortest"] == everything["test/raised+shortest"]


def test_the_identity_gives_identical_prompts() -> None:
    only = parse_perturbations(
        "name: none\nperturbations: [{name: none, family: identity, semantics: preserved}]", where="here"
    )
    items = perturb(POOL, only).items
    assert [one.prompt for one in items[::2]] == [one.prompt for one in items[1::2]]


def test_added_text_goes_where_the_placement_says() -> None:
    assert add_text("def f(x):\n", "Be quick.", "user_turn") == "def f(x):\n\nBe quick.\n"
    assert add_text("def f(x):\n", "Be\nquick.", "comment") == "def f(x):\n    # Be\n    # quick.\n"
    assert add_text("Add.\n\nassert f(1)\n[BEGIN]\n", "Be quick.", "user_turn").endswith("Be quick.\n\n[BEGIN]\n")
    with pytest.raises(ConfigError, match="'placement' is not a known choice"):
        perturb(POOL, SHIPPED, placement="system")  # type: ignore[arg-type]


def test_suffixes_speak_of_the_items_own_function_and_leave_the_rest_alone() -> None:
    (item,) = _only("off_by_one")
    assert (
        item.prompt
        == POOL[0].prompt + "\nIn raised the end of every range is meant one lower than it is written above.\n"
    )


def test_items_without_what_a_perturbation_needs_are_left_out_and_counted() -> None:
    prompt = 'def f(x):\n    """Give it back."""\n'
    bare = Item("bare", "test", "task", "code", prompt, materials={"tests": "assert f(1)", "entry_point": "f"})
    made = perturb([bare], SHIPPED)
    assert made.left_out == {
        "ignore_last_argument": 1,
        "buggy_1": 1,
        "buggy_2": 1,
        "buggy_3": 1,
        "mismatched_2": 1,
        "wrong_docstring_2": 1,
        "truncated_2": 1,
        "paraphrase": 1,
        "docstring_reorder": 1,
    }
    assert len(made.items) == 1 + 24 - 9


@pytest.mark.parametrize("name", ["buggy_1", "buggy_3", "mismatched_2", "wrong_docstring_2", "truncated_2"])
def test_poor_examples_come_before_the_problem_and_never_show_it(name: str) -> None:
    (item,) = _only(name)
    shown = item.prompt.removesuffix(POOL[0].prompt)
    assert item.prompt.endswith(POOL[0].prompt)
    assert "raised" not in shown
    assert shown.count("```python") == int(name[-1])


def test_each_kind_of_poor_example_is_poor_in_its_own_way() -> None:
    right = {one.prompt.strip(): one.materials["canonical"].strip() for one in POOL}
    for name, poor in (("mismatched_2", True), ("wrong_docstring_2", True), ("truncated_2", True), ("buggy_2", True)):
        (item,) = _only(name)
        blocks = item.prompt.split("Problem ")[1:3]
        for block in blocks:
            problem, _, rest = block.partition("\n")[2].partition("\n\nSolution ")
            solution = rest.partition("```python\n")[2].partition("\n```")[0]
            assert problem.strip() in right
            assert (solution != right[problem.strip()]) is poor


def test_a_bug_is_one_change_of_an_operator_or_a_number() -> None:
    code = "def f(x):\n    return x + 1 if x > 2 else x"
    found = {buggy(code, random.Random(seed)) for seed in range(30)}
    assert found == {
        "def f(x):\n    return x - 1 if x > 2 else x",
        "def f(x):\n    return x + 2 if x > 2 else x",
        "def f(x):\n    return x + 1 if x >= 2 else x",
        "def f(x):\n    return x + 1 if x > 3 else x",
    }
    assert buggy("def f(x):\n    return x", random.Random(0)) == "def f(x):\n    return x"
    assert truncated("a\nb\nc\nd") == "a\nb"


@pytest.mark.parametrize("name", NOISES)
def test_noise_leaves_code_and_examples_alone(name: str) -> None:
    (item,) = _only(name)
    for line in ("def raised(numbers: List[int], step: int) -> List[int]:", "    >>> raised([1, 3], 4)", "    [7]"):
        assert line in item.prompt.splitlines()
    stub = split_prompt(item.prompt, "raised").stub
    assert ast.parse(stub + BODY)
    assert stub == item.prompt


def test_typos_swap_letters_and_capitals_change_case_alone() -> None:
    for name, same in (("typos", sorted), ("capitals", lambda text: text.lower())):
        (item,) = _only(name)
        before, after = POOL[0].prompt.split(), item.prompt.split()
        changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
        assert changed
        assert all(same(old) == same(new) for old, new in changed)


def test_examples_can_come_before_the_description() -> None:
    moved = examples_first(POOL[0].prompt, "raised")
    assert moved is not None
    assert moved.index(">>> raised") < moved.index("Write a function") < moved.index("Nothing else")
    assert sorted(moved.split()) == sorted(POOL[0].prompt.split())
    assert examples_first("def f(x):\n    '''No example.'''\n", "f") is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- 1", "no mapping with a name"),
        ("name: x", "no list under 'perturbations'"),
        ("name: x\nperturbations: [{name: a b}]", "the name 'a b'"),
        ("name: x\nperturbations: [{name: a, family: typos, semantics: preserved}]", "'family' is not a known one"),
        ("name: x\nperturbations: [{name: a, family: identity, semantics: kept}]", "did you mean 'preserved'|one of: "),
        ("name: x\nperturbations: [{name: a, famly: identity}]", "did you mean 'family'"),
        (
            "name: x\nperturbations:\n"
            "  - {name: a, family: natural_noise, semantics: preserved, settings: {kind: typos, shar: 0.1}}\n",
            "the setting 'shar' with the family natural_noise",
        ),
        ("name: x\nperturbations: [{name: a, family: degrade_request, semantics: preserved}]", "no template"),
        (
            "name: x\nperturbations:\n"
            "  - {name: a, family: degrade_request, semantics: preserved, template: '{entry_point}'}",
            "slot {entry_point}, which 'needs' does not name",
        ),
        (
            "name: x\nperturbations: [{name: a, family: identity, semantics: preserved},"
            " {name: a, family: identity, semantics: preserved}]",
            "the name 'a' a second time",
        ),
    ],
)
def test_a_malformed_set_says_what_is_wrong(text: str, said: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_perturbations(text, where="mine.yaml")
    assert "mine.yaml" in str(caught.value)
    assert any(one in str(caught.value) for one in said.split("|"))


def test_users_bring_their_own_list(tmp_path: Path) -> None:
    path = tmp_path / "paper.yaml"
    path.write_text(
        "name: paper-1\nsays: Theirs.\nperturbations:\n"
        "  - {name: p1, family: misleading_suffix, semantics: contradicted, needs: [trap], template: 'Mind {trap}'}\n",
        encoding="utf-8",
    )
    mine = read_perturbations(path)
    item = Item("one", "test", "task", "code", "Add.", materials={"trap": "the {trap} step"})
    assert perturb([item], mine).items[1].prompt == "Add.\n\nMind the {trap} step\n"
    assert mine.digest != SHIPPED.digest
    with pytest.raises(MissingError, match="There is no set of perturbations"):
        read_perturbations(tmp_path / "none.yaml")


def test_examples_can_be_worded_otherwise() -> None:
    settings = {"kind": "truncated", "examples": 1, "opening": "", "example": "Q{number} {solution}\n", "closing": "Q "}
    one = Perturbation("mine", "poor_examples", "preserved", ("examples",), settings=settings)
    prompt = perturb(POOL, type(SHIPPED)("x", "", (one,), "")).items[1].prompt
    assert prompt.startswith("Q1 from typing")
    assert prompt.endswith("Q " + POOL[0].prompt)


def test_a_setting_out_of_range_is_refused() -> None:
    wrong = Perturbation("many", "poor_examples", "preserved", settings={"kind": "buggy", "examples": 99})
    with pytest.raises(ConfigError, match="'examples' is out of range"):
        perturb(POOL, type(SHIPPED)("x", "", (wrong,), ""))


@pytest.mark.skipif("KEELWRIGHT_DATA" not in os.environ, reason="HumanEval is in the shared data sets")
def test_every_perturbed_problem_of_humaneval_still_opens_its_function() -> None:
    items = read_humaneval(read_rows(Path(os.environ["KEELWRIGHT_DATA"]) / "humaneval" / "HumanEval.jsonl.gz"))
    made = perturb(items[::16], SHIPPED, pool=items).items
    assert all(split_prompt(one.prompt, one.materials["entry_point"]).stub for one in made)
