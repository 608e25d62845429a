# SPDX-License-Identifier: Apache-2.0
"""A recipe file, ours or mergekit's, as a `Recipe`."""

from __future__ import annotations

from pathlib import Path

from keelwright.core.errors import ConfigError
from keelwright.weights.recipes.mergekit import read_mergekit
from keelwright.weights.recipes.own import read_own
from keelwright.weights.recipes.recipe import Recipe
from keelwright.weights.recipes.text import parse_document, read_text


def read_recipe(path: Path | str) -> Recipe:
    """Return the recipe of a file; which format it has is told by its keys. No model is opened.

    Raises:
        MissingError: There is no such file.
        ConfigError: It is no recipe, or something in it is unknown, missing, wrong or not done.
    """
    return recipe_from_text(read_text(path), where=Path(path).name)


def recipe_from_text(text: str, *, where: str = "recipe") -> Recipe:
    """Return the recipe that a text stands for; see `read_recipe`.

    Args:
        text: YAML.
        where: The text's name, for error texts.
    """
    document = parse_document(text, where)
    if "keelwright" in document:
        return read_own(document, where)
    if {"merge_method", "experts", "gate_mode", "genome"} & set(document):
        return read_mergekit(document, where)
    raise ConfigError(
        f"{where}: not a recipe.",
        expected="'keelwright: 1' and 'method: NAME', or a mergekit file with 'merge_method: NAME'",
        found=f"the keys {', '.join(map(str, document)) or 'none'}",
        fix="add 'keelwright: 1' at the top" if "method" in document else "name the method",
    )
