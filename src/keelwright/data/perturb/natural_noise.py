# SPDX-License-Identifier: Apache-2.0
"""The family `natural_noise`: what a hurried person does to a description, and what leaves its meaning alone.

typos: two inner letters of a word change places. capitals: words in capital letters. paraphrase: usual phrases for
others of the same meaning. docstring_reorder: the examples before the description. Only prose changes: never code,
examples, assertions, names, or what stands in quotation marks.

Source:
    Wang et al., ReCode, arXiv 2212.10264 (the families; the rules are ours).
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable
from typing import Final

from keelwright.core.config import require_choice, require_in_range
from keelwright.core.records import Item
from keelwright.data.code_prompt import INDENT, docstring_lines, split_prompt
from keelwright.data.perturb.perturbation import Perturbation

KINDS: Final = ("typos", "capitals", "paraphrase", "docstring_reorder")
_WORD: Final = re.compile(r"(?<![\w'\"`.\[(=-])[A-Za-z]{4,}(?![\w'\"`(\[=])")
_CODE_LINE: Final = re.compile(r"\s*(?:>>>|\.\.\.|assert\b|\[|```)")
_EXAMPLE: Final = re.compile(r"->|=>|==|➞|\breturns?\b.*[\[(]|\w\(.*\)")
_PHRASES: Final = (
    (r"\b[Ww]rite a (?:python )?function (?:to|that can)\b", "Implement a function that is able to"),
    (r"\b[Cc]heck (?:if|whether)\b", "Find out whether"),
    (r"\bReturns? (?=[a-z])", "Give back "),
    (r"\breturns? (?=[a-z])", "give back "),
    (r"\b[Ff]ind (?=the|a|all)", "Determine "),
    (r"\bcalculate\b", "compute"),
    (r"\belements\b", "items"),
    (r"\bsuch that\b", "so that"),
    (r"\b[Yy]our task is to\b", "You have to"),
    (r"\bInput to this function is\b", "This function receives"),
    (r"\bfrom the given\b", "from the supplied"),
)
_TEXT: Final = re.compile(r'\A(\s*)([rRuU]?(?:"""|\'\'\'))(.*?)(\2)\s*\Z', re.DOTALL)


def with_noise(item: Item, perturbation: Perturbation, rng: random.Random) -> str | None:
    """Return the item's prompt with noise in its prose; None where there is nothing that the noise could change.

    Args:
        item: The problem.
        perturbation: Settings `kind` and, for typos and capitals, `share` of words, 0 to 1.
        rng: Draws the words.

    Raises:
        ConfigError: A setting is out of range.
    """
    kind = str(perturbation.settings.get("kind"))
    require_choice("kind", kind, KINDS)
    share = float(perturbation.settings.get("share", 0.15))
    require_in_range("share", share, low=0.0, high=1.0)
    if kind == "docstring_reorder":
        return examples_first(item.prompt, item.materials.get("entry_point", ""))
    entry_point = item.materials.get("entry_point", "")
    if kind == "paraphrase":
        changed = _on_prose(item.prompt, entry_point, _paraphrased)
    else:
        change = str.upper if kind == "capitals" else lambda word: _swapped(word, rng)
        changed = _some_words(item.prompt, entry_point, share, rng, change)
    return changed if changed != item.prompt else None


def examples_first(prompt: str, entry_point: str) -> str | None:
    """Return the prompt with its docstring's examples before its description; None where it has not both."""
    cut = split_prompt(prompt, entry_point)
    lines = cut.stub.splitlines(keepends=True)
    covered = docstring_lines(cut.stub, entry_point)
    match = _TEXT.match("".join(lines[covered.start : covered.stop])) if covered else None
    if match is None:
        return None
    indent, quotes, text, closing = match.groups()
    inner = text.splitlines()
    first = next((number for number, line in enumerate(inner) if line.lstrip().startswith(">>>")), 0)
    description = [line.strip() for line in inner[:first] if line.strip()]
    examples = [line.strip() for line in inner[first:] if line.strip()]
    if not description or not examples:
        return None
    margin = indent.strip("\n") or INDENT
    body = "".join(f"{margin}{line}\n" for line in [*examples, "", *description]).replace(f"{margin}\n", "\n")
    text = f"{margin}{quotes}\n{body}{margin}{closing}\n"
    return f"{cut.before}{''.join(lines[: covered.start])}{text}{''.join(lines[covered.stop :])}{cut.after}"


def _on_prose(prompt: str, entry_point: str, change: Callable[[str], str]) -> str:
    cut = split_prompt(prompt, entry_point)
    covered = docstring_lines(cut.stub, entry_point)
    stub = cut.stub.splitlines(keepends=True)
    described = "".join(stub[covered.start : covered.stop])
    return "".join(
        [
            _on_lines(cut.before, change),
            *stub[: covered.start],
            _on_lines(described, change),
            *stub[covered.stop :],
            _on_lines(cut.after, change),
        ]
    )


def _on_lines(text: str, change: Callable[[str], str]) -> str:
    """Change the lines of prose; what follows a prompt `>>>` up to the next empty line is its output."""
    changed, in_example, in_code = [], False, False
    for line in text.splitlines(keepends=True):
        if line.lstrip().startswith("```"):
            in_code = not in_code
        in_example = line.lstrip().startswith(">>>") or (in_example and bool(line.strip()))
        keep = in_example or in_code or _CODE_LINE.match(line) or _EXAMPLE.search(line)
        changed.append(line if keep else change(line))
    return "".join(changed)


def _some_words(prompt: str, entry_point: str, share: float, rng: random.Random, change: Callable[[str], str]) -> str:
    """Change the wanted share of the prose's words, at least one."""
    words: list[str] = []

    def count(line: str) -> str:
        words.extend(_WORD.findall(line))
        return line

    _on_prose(prompt, entry_point, count)
    chosen = set(rng.sample(range(len(words)), min(len(words), max(1, round(share * len(words))))))
    numbers = itertools.count()

    def changed(line: str) -> str:
        return _WORD.sub(lambda word: change(word[0]) if next(numbers) in chosen else word[0], line)

    return _on_prose(prompt, entry_point, changed)


def _swapped(word: str, rng: random.Random) -> str:
    """Return the word with two different inner letters in each other's place; as it is where there are none."""
    places = [at for at in range(1, len(word) - 2) if word[at] != word[at + 1]]
    if not places:
        return word
    at = rng.choice(places)
    return word[:at] + word[at + 1] + word[at] + word[at + 2 :]


def _paraphrased(line: str) -> str:
    for pattern, phrase in _PHRASES:
        line = re.sub(pattern, phrase, line)
    return line
