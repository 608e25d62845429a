# SPDX-License-Identifier: Apache-2.0
"""The family `poor_examples`: solved problems before the one to solve, solved badly.

buggy: one operator or number of the solution is another. mismatched: the solution of another problem.
wrong_docstring: the right solution under another problem's description. truncated: the solution breaks off halfway.
Examples come from the other items' canonical solutions; the problem itself is never among them.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Mapping, Sequence
from typing import Final

from keelwright.core.config import require_choice, require_in_range
from keelwright.core.records import Item
from keelwright.data.code_prompt import parsed
from keelwright.data.perturb.perturbation import Perturbation

KINDS: Final = ("buggy", "mismatched", "wrong_docstring", "truncated")
MOST_EXAMPLES: Final = 8

WORDING: Final = {
    "opening": "Here is how similar problems were solved.\n\n",
    "example": "Problem {number}:\n{problem}\n\nSolution {number}:\n```python\n{solution}\n```\n\n",
    "closing": "Now this problem:\n\n",
}
"""Texts around the examples; a perturbation's settings may hold others under these names."""

_SLOT: Final = re.compile(r"\{(number|problem|solution)\}")
_SWAPS: Final[dict[type, type]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Mod: ast.FloorDiv,
    ast.FloorDiv: ast.Mod,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


def with_poor_examples(item: Item, perturbation: Perturbation, rng: random.Random, pool: Sequence[Item]) -> str | None:
    """Return the item's prompt after poorly solved problems; None where the pool has too few.

    Args:
        item: The problem to solve.
        perturbation: Settings `kind` and `examples`, and perhaps those of `WORDING`.
        rng: Draws examples and faults.
        pool: Problems with the material `canonical`.

    Raises:
        ConfigError: A setting is out of range.
    """
    kind, count = str(perturbation.settings.get("kind")), int(perturbation.settings.get("examples", 1))
    wording = {name: str(perturbation.settings.get(name, text)) for name, text in WORDING.items()}
    require_choice("kind", kind, KINDS)
    require_in_range("examples", count, low=1, high=MOST_EXAMPLES)
    name = item.materials.get("entry_point", "")
    own = re.compile(rf"\bdef\s+{re.escape(name)}\b") if name else None
    others = [
        one
        for one in pool
        if one.item_id != item.item_id and (own is None or not own.search(one.materials["canonical"]))
    ]
    pairs = count + 1 if kind in ("mismatched", "wrong_docstring") else count
    if len(others) < pairs:
        return None
    drawn = rng.sample(others, pairs)
    shown = []
    for index, one in enumerate(drawn[:count]):
        problem, solution = one.prompt, one.materials["canonical"].strip()
        other = drawn[(index + 1) % len(drawn)]
        if kind == "buggy":
            solution = buggy(solution, rng)
        elif kind == "mismatched":
            solution = other.materials["canonical"].strip()
        elif kind == "wrong_docstring":
            problem = other.prompt
        else:
            solution = truncated(solution)
        texts = {"number": str(index + 1), "problem": _plain(problem), "solution": solution}
        shown.append(_filled(wording["example"], texts))
    return f"{wording['opening']}{''.join(shown)}{wording['closing']}{item.prompt}"


def buggy(code: str, rng: random.Random) -> str:
    """Return the code with one operator swapped or one whole number one higher; unchanged where there is none."""
    tree = parsed(code)
    places = [node for node in ast.walk(tree) if _faults(node)] if tree is not None else []
    if tree is None or not places:
        return code
    node = rng.choice(places)
    if isinstance(node, ast.Constant):
        node.value = int(str(node.value)) + 1
    elif isinstance(node, ast.Compare):
        node.ops[0] = _SWAPS[type(node.ops[0])]()
    elif isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign):
        node.op = _SWAPS[type(node.op)]()
    return ast.unparse(tree)


def truncated(code: str) -> str:
    """Return the first half of the code's lines, at least one."""
    lines = code.splitlines()
    return "\n".join(lines[: max(1, len(lines) // 2)])


def _faults(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return type(node.value) is int
    if isinstance(node, ast.Compare):
        return type(node.ops[0]) in _SWAPS
    return isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in _SWAPS


def _filled(template: str, texts: Mapping[str, str]) -> str:
    return _SLOT.sub(lambda slot: texts[slot[1]], template)


def _plain(problem: str) -> str:
    """Return a problem without the mark after which its own solution would come."""
    return problem.strip().removesuffix("[BEGIN]").strip()
