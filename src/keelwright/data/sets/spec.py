# SPDX-License-Identifier: Apache-2.0
"""What is said of a set before it is read, and what comes out of reading it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from keelwright.core.records import Item
from keelwright.data.labelled import LabelledAnswer, LabelledText
from keelwright.data.preferences import PreferenceRow

Files = Mapping[str, tuple[Path, ...]]
"""The files of a set that were found, by role; a role that may be absent is missing from it."""


@dataclass(frozen=True, slots=True)
class FileSpec:
    """One part of a set, under every name that it is known by."""

    role: str
    names: tuple[str, ...]
    """Names of the one file, ours and upstream's; the first that is there is read."""
    hub: tuple[str, ...] = ()
    """The same part in the hub's repository: all of these files together."""
    required: bool = True


@dataclass(frozen=True, slots=True)
class SetSpec:
    """One published set."""

    name: str
    title: str
    licence: str
    citation: str
    """Authors, title and place, with the arXiv id where there is one."""
    upstream: str
    """Where its authors, or who keeps it now, publish the files."""
    files: tuple[FileSpec, ...]
    loader: str
    """`module:function`; called with the files and the set's options."""
    holds: str
    """What it gives, in a few words."""
    kinds: tuple[str, ...] = ()
    """Kinds of its items; empty where it holds labelled texts or answers instead."""
    folder: str | None = None
    """Its folder among the folders of a data directory; None where it is the set's name."""
    hub: str | None = None
    """Its id on the Hugging Face hub; None where its authors do not publish these files there."""
    caution: str = ""
    """What whoever quotes a figure must know."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What a set's files hold."""

    items: tuple[Item, ...] = ()
    answers: tuple[LabelledAnswer, ...] = ()
    texts: tuple[LabelledText, ...] = ()
    pairs: tuple[PreferenceRow, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)
    """How many rows were read and not given out, by reason."""


@dataclass(frozen=True, slots=True)
class LoadedSet:
    """A set that was read."""

    name: str
    items: tuple[Item, ...]
    answers: tuple[LabelledAnswer, ...]
    texts: tuple[LabelledText, ...]
    pairs: tuple[PreferenceRow, ...]
    left_out: Mapping[str, int]
    digest: str
    """Of the bytes of its files."""
    licence: str
    caution: str
    paths: tuple[Path, ...]
    """The files that were read."""

    @property
    def path(self) -> Path:
        """The folder of the first file that was read."""
        return self.paths[0].parent
