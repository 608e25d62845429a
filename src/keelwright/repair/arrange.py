# SPDX-License-Identifier: Apache-2.0
"""How a method wants its models presented: under other names, with other rows.

Most methods take models with the same tensors as they are. One that does not has `arranged(sources, tokens)`, which
returns itself, knowing what it found, and the sources that it will read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from keelwright.core.protocols import Progress, Silent, TensorSource, WeightEdit
from keelwright.models.folders import has_tokenizer
from keelwright.models.refs import LocalModel, ModelRef
from keelwright.models.token_table import TokenTable, read_tokens


@runtime_checkable
class Arranges(Protocol):
    """A method that has its models presented to it."""

    def arranged(
        self, sources: Mapping[str, TensorSource], tokens: Mapping[str, TokenTable | None]
    ) -> tuple[WeightEdit, Mapping[str, TensorSource], tuple[str, ...]]:
        """Return the edit that knows its models, the sources that it reads, and notes for a person.

        Args:
            sources: Tensors by role, as they are.
            tokens: Vocabularies by role; None where a model brings none.
        """


def same_architecture(edit: object) -> bool:
    """Say whether a method needs models of one architecture; it says otherwise by `same_architecture = False`."""
    return bool(getattr(type(edit), "same_architecture", True))


def arrange(
    edits: Sequence[WeightEdit],
    sources: Mapping[str, TensorSource],
    refs: Mapping[str, ModelRef],
    locals_: Mapping[str, LocalModel | None],
    *,
    progress: Progress | None = None,
) -> tuple[list[WeightEdit], dict[str, TensorSource]]:
    """Return the edits and the sources that they read.

    Args:
        edits: One method with several settings; its models are looked at once.
        sources: Tensors by role.
        refs: The models by role.
        locals_: Their files by role; None for a model in memory.
        progress: Told what a person should know.

    Raises:
        ModelMismatchError: The models do not fit together.
    """
    first: Any = edits[0]
    if not isinstance(first, Arranges):
        return list(edits), dict(sources)
    tokens = {role: _tokens(refs[role], locals_[role]) for role in sources}
    known, shown, notes = first.arranged({role: sources[role] for role in edits[0].roles()}, tokens)
    for note in notes:
        (progress or Silent()).note(note)
    return [with_config(known, edit) for edit in edits], dict(shown)


def with_config(known: Any, edit: Any) -> WeightEdit:
    """Return `known` with the settings of `edit`."""
    found: WeightEdit = dataclasses.replace(known, config=edit.config)
    return found


def _tokens(ref: ModelRef, local: LocalModel | None) -> TokenTable | None:
    if local is not None:
        folder = local.tokenizer_folder
        return read_tokens(folder, ref.text) if has_tokenizer(folder) else None
    if ref.live is None:
        return None
    tokenizer = ref.live.tokenizer
    flags = {
        str(one): (one.special, one.normalized, one.single_word, one.lstrip, one.rstrip)
        for one in tokenizer.added_tokens_decoder.values()
    }
    return TokenTable(dict(tokenizer.get_vocab()), flags, type(tokenizer).__name__, "")
