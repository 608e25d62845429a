# SPDX-License-Identifier: Apache-2.0
"""Hand-written recipes: one per refusal with the whole message, and one per feature with the whole plan."""

from pathlib import Path

import pytest

from keelwright.core.errors import KeelwrightError
from keelwright.weights.recipes.explain import describe
from keelwright.weights.recipes.plan import expand
from keelwright.weights.recipes.reader import read_recipe

CORPUS = Path(__file__).parent / "corpus"


def outcome(path, headers_for):
    """Return the plan of a recipe as text, or the whole message of its refusal."""
    try:
        recipe = read_recipe(path)
        expansion = expand(recipe, headers_for(recipe))
    except KeelwrightError as error:
        return f"{type(error).__name__}: {error}\n"
    return "".join(f"{left:<42} {right}\n" for left, right in describe(recipe, expansion))


@pytest.mark.parametrize("path", sorted(CORPUS.glob("refused/*.yaml")), ids=lambda path: path.stem)
def test_recipe_is_refused_with_these_words(path, headers_for):
    found = outcome(path, headers_for)
    assert "Error: " in found
    assert "expected:" in found
    assert "fix:" in found
    assert found == path.with_suffix(".txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted(CORPUS.glob("accepted/*.yaml")), ids=lambda path: path.stem)
def test_recipe_comes_to_this_plan(path, headers_for):
    assert outcome(path, headers_for) == path.with_suffix(".txt").read_text(encoding="utf-8")


def test_every_text_of_the_corpus_has_its_recipe():
    assert {path.with_suffix("") for path in CORPUS.glob("*/*.txt")} == {
        path.with_suffix("") for path in CORPUS.glob("*/*.yaml")
    }
