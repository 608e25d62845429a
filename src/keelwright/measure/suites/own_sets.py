# SPDX-License-Identifier: Apache-2.0
"""A user's own rows as a set of a suite: a part names the file, and its settings say which column is what.

sets: [requests.csv]
settings:
  requests.csv:
    mapping: {prompt: question, kind: =harmful, hazard: category}
    licence: our own
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from keelwright.core.config import config_from_mapping, require_choice
from keelwright.core.digests import file_digest, json_digest
from keelwright.core.records import Kind
from keelwright.data.sets.spec import LoadedSet
from keelwright.data.source_rows import FORMATS
from keelwright.data.user_set import read_user_set


@dataclass(frozen=True, slots=True)
class OwnSet:
    """How a file of rows is read as a set."""

    mapping: Mapping[str, str]
    """Column by field of an item, or `=` and a constant; see `data.user_set`."""
    kinds: Mapping[str, str] = field(default_factory=dict)
    """Kinds of items by what the kind column says."""
    name: str = ""
    """What the set is called; empty: the file's name without its ending."""
    licence: str = ""
    """As the report names it."""
    caution: str = ""
    """What figures on this set do not mean."""


def is_own(name: str) -> bool:
    """Whether a part's set is a file of rows rather than the name of a published set."""
    return name.lower().removesuffix(".gz").endswith(FORMATS)


def read_own_set(name: str, settings: Mapping[str, Any]) -> LoadedSet:
    """Return a file of rows as a set.

    Args:
        name: Its path, as the part names it.
        settings: Fields of `OwnSet`.

    Raises:
        ConfigError: A setting is unknown, missing or wrong.
        MissingError: There is no such file.
        DataError: The file or a row is malformed, or an id is repeated.
    """
    chosen = config_from_mapping(OwnSet, settings, where=f"settings of '{name}'")
    path = Path(name)
    title = chosen.name or path.name.partition(".")[0]
    known: dict[str, Kind] = {one: one for one in get_args(Kind)}
    for said, meant in chosen.kinds.items():
        require_choice(f"kind of '{said}'", meant, known)
    kinds = {said: known[meant] for said, meant in chosen.kinds.items()}
    items = read_user_set(path, mapping=chosen.mapping, name=title, kinds=kinds)
    return LoadedSet(
        name=title,
        items=tuple(items),
        answers=(),
        texts=(),
        pairs=(),
        left_out={},
        digest=json_digest([file_digest(path), dict(chosen.mapping), kinds]),
        licence=chosen.licence,
        caution=chosen.caution,
        paths=(path,),
    )
