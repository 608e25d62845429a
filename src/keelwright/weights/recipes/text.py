# SPDX-License-Identifier: Apache-2.0
"""A recipe's text as plain mappings and lists: no code, no duplicate keys, one document, a bounded size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from keelwright.core.errors import ConfigError, MissingError

_BYTES_LIMIT: Final = 1 << 20
_NODES_LIMIT: Final = 100_000
"""After anchors are followed: a few lines of nested anchors can stand for billions of values."""


class _StrictLoader(yaml.SafeLoader):
    """The safe loader, which makes plain values only, and refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping, or raise where a key stands twice or is no text."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key that is no text", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{key.value}' twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def read_text(path: Path | str) -> str:
    """Return a recipe file's text.

    Raises:
        MissingError: There is no such file.
        ConfigError: It is larger than 1 MiB, or not UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingError(
            f"There is no file '{path}'.",
            expected="a recipe in YAML",
            found="a folder" if path.is_dir() else "nothing",
            fix="check the path",
        )
    size = path.stat().st_size
    if size > _BYTES_LIMIT:
        raise ConfigError(
            f"'{path}' is too large for a recipe.",
            expected=f"at most {_BYTES_LIMIT} bytes",
            found=f"{size} bytes",
            fix="check that it is the recipe and not a checkpoint",
        )
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"'{path}' is not UTF-8 text.", expected="a UTF-8 YAML file", found=str(error), fix="save it as UTF-8"
        ) from error


def parse_document(text: str, where: str) -> dict[str, Any]:
    """Return the one mapping that the text holds.

    Args:
        text: YAML, or JSON, which is YAML.
        where: The file, for error texts.

    Raises:
        ConfigError: The text is no YAML, holds several documents or none, is no mapping, or repeats a key.
    """
    try:
        documents = list(yaml.load_all(text, _StrictLoader))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{where}: the recipe cannot be read.",
            expected="YAML with plain values, each key once",
            found=_first_words(error),
            fix="mend the line named above",
        ) from error
    if len(documents) > 1:
        raise ConfigError(
            f"{where}: the file holds several documents.",
            expected="one recipe per file",
            found=f"{len(documents)} documents separated by '---'",
            fix="split it into one file per recipe, and run them one after the other",
        )
    if not documents or not isinstance(documents[0], dict):
        kind = type(documents[0]).__name__ if documents and documents[0] is not None else "nothing"
        raise ConfigError(
            f"{where}: not a recipe.",
            expected="a mapping of settings, with 'keelwright: 1' and 'method', or with 'merge_method'",
            found=kind,
            fix="see 'recipes' in the documentation",
        )
    _require_small(documents[0], where)
    return documents[0]


def _require_small(document: object, where: str) -> None:
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: object) -> int:
        if not isinstance(node, (Mapping, list)):
            return 1
        if id(node) in open_nodes:
            return _NODES_LIMIT + 1
        if id(node) not in sizes:
            open_nodes.add(id(node))
            members = node.values() if isinstance(node, Mapping) else node
            sizes[id(node)] = 1 + sum(size(member) for member in members)
            open_nodes.discard(id(node))
        return sizes[id(node)]

    if size(document) > _NODES_LIMIT:
        raise ConfigError(
            f"{where}: the anchors of the recipe stand for too many values.",
            expected=f"at most {_NODES_LIMIT} values once every anchor is followed, none inside itself",
            found="more, or an anchor inside itself",
            fix="write the values out",
        )


def _first_words(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return " ".join(str(error).split())[:200] or type(error).__name__
