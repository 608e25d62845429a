# SPDX-License-Identifier: Apache-2.0
"""A language model shown as the text stack of a vision-language model: its tensors under that model's names.

What must agree is checked here, from headers, settings and tokenizers: every tensor of one stack is in the other, both
compute alike, and the rows that both have in the vocabulary tables stand for the same tokens. Rows that only the
vision-language model knows (its image tokens, whether added after the vocabulary or put into its padding) are its own:
the language model is shown with that model's rows there, so that a merge leaves them as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from keelwright.core.errors import ModelMismatchError
from keelwright.core.protocols import TensorEntry, TensorSource
from keelwright.models.configs import parse_config
from keelwright.models.dtypes import STORED_NAMES, TORCH_DTYPES
from keelwright.models.names import tied_tensors
from keelwright.models.stacks import EMBEDDING, HEAD, StackMatch, match_text_stack, text_stack
from keelwright.models.token_table import TokenTable
from keelwright.weights.plan import Configured
from keelwright.weights.sources import AliasedSource, RenamedSource, source_digest

_SAME_SETTINGS = (
    "hidden_act",
    "hidden_activation",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "layer_norm_eps",
    "sliding_window",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)
"""What the same weights compute depends on, and shapes do not show. The rotary base is compared apart."""

_PLAIN_ROPE = ("default", "mrope")
"""With text alone, the rotary embedding in three dimensions is the one-dimensional one."""

Ranges = tuple[tuple[int, int], ...]
"""Rows that follow one another, as first and one past the last."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """Models that show the same text stack, and what follows for the output."""

    sources: Mapping[str, TensorSource]
    """By role; every one has the text stack under the vision-language model's names."""
    text_names: Mapping[str, str]
    """For each tensor of the text stack its name in a language model alone."""
    layers: int
    """Number of layers of the text stack."""
    config_changes: Mapping[str, Any] = field(default_factory=dict)
    """Keys of `config.json` that the output states differently from the vision-language model's."""
    notes: tuple[str, ...] = ()
    """What a person should know, one line each."""


class KeptRows:
    """A source that shows another model's rows in some of its tables.

    Args:
        inner: The source.
        donor: The model whose rows are shown.
        rows: By table: which rows are the donor's. The tables have the donor's number of rows.
    """

    def __init__(self, inner: TensorSource, donor: TensorSource, rows: Mapping[str, Ranges]) -> None:
        self.inner = inner
        self.donor = donor
        self.rows = dict(rows)
        own, other = inner.entries(), donor.entries()
        changed = {
            name: TensorEntry(name, _common_dtype(own[name].dtype, other[name].dtype), other[name].shape)
            for name in self.rows
        }
        self._entries = {**own, **changed}

    def entries(self) -> Mapping[str, TensorEntry]:
        """Return the tensors; a table with rows of two dtypes is in the dtype that holds both."""
        return self._entries

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return elements `start:stop` of the flattened tensor."""
        if name not in self.rows:
            return self.inner.read(name, start, stop)
        entry = self._entries[name]
        columns = entry.elements // max(1, entry.shape[0])
        values = torch.empty(stop - start, dtype=TORCH_DTYPES[entry.dtype])
        limit = min(stop, self.inner.entries()[name].elements)
        if limit > start:
            values[: limit - start] = self.inner.read(name, start, limit)
        for first, last in self.rows[name]:
            begin, end = max(start, first * columns), min(stop, last * columns)
            if end > begin:
                values[begin - start : end - start] = self.donor.read(name, begin, end)
        return values

    def describe(self) -> str:
        """Return the user's own words for the source."""
        return self.inner.describe()

    def data_digest(self) -> str:
        """Return a digest of both models and of which rows are whose."""
        own = source_digest(self.inner)
        parts = "\x1f".join([own, source_digest(self.donor), repr(sorted(self.rows.items()))])
        return f"{own.partition(':')[0]}:{hashlib.sha256(parts.encode()).hexdigest()}"


def fit_text_stacks(
    sources: Mapping[str, TensorSource],
    tokens: Mapping[str, TokenTable | None],
    *,
    partial: bool = False,
) -> Fitted:
    """Return language models shown as the text stack of a vision-language model.

    Args:
        sources: By role; the last one is the vision-language model, whose names and rows the others are given.
        tokens: Vocabularies by role; None where there is none to compare.
        partial: Leave out tensors without a counterpart, instead of refusing.

    Raises:
        ModelMismatchError: The text stacks do not cover each other, have other shapes, compute differently, or their
            shared rows stand for different tokens; or the last model has no vision side.
    """
    *texts, vision = sources
    donor, entries = sources[vision], sources[vision].entries()
    matches = {
        role: match_text_stack(
            entries,
            sources[role].entries(),
            vision_config=_config(donor),
            text_config=_config(sources[role]),
            partial=partial,
            names=(vision, role),
        )
        for role in texts
    }
    _require_vision(matches, vision, donor)
    for role in texts:
        _require_same_settings(_config(sources[role]), _config(donor), (role, vision))
    names = dict(next(iter(matches.values())).text_names)
    for match in matches.values():
        names = {stored: name for stored, name in names.items() if stored in match.text_names}
    notes = [note for role in texts for note in _notes(matches[role], role)]
    shown, changes, head = _with_head(donor, sources, matches)
    if head is not None:
        names[head] = HEAD
        notes.append(f"'{vision}' ties its head to its embedding and another model does not: the output stores both")
    table = next((stored for stored, name in names.items() if name == EMBEDDING), None)
    ranges = _own_rows(matches, tokens, entries[table], vision) if table is not None else ()
    if ranges:
        count = sum(last - first for first, last in ranges)
        notes.append(f"{count} rows of the vocabulary are the vision-language model's own and stay as they are")
    kept = {stored: ranges for stored, name in names.items() if name in (EMBEDDING, HEAD)}
    fitted: dict[str, TensorSource] = {}
    for role in texts:
        stack = _stack_of(matches[role], sources[role], names)
        uneven = any(one.vision != one.text for one in matches[role].rows.values())
        renamed = RenamedSource(sources[role], stack)
        fitted[role] = KeptRows(renamed, shown, kept) if ranges or uneven else renamed
    fitted[vision] = shown
    layers = {int(name.split(".")[2]) for name in names.values() if name.startswith("model.layers.")}
    return Fitted(fitted, names, max(layers, default=-1) + 1, changes, tuple(notes))


def _common_dtype(one: str, other: str) -> str:
    return STORED_NAMES[torch.promote_types(TORCH_DTYPES[one], TORCH_DTYPES[other])]


def _config(source: TensorSource) -> dict[str, Any]:
    return source.config_json() if isinstance(source, Configured) else {}


def _require_vision(matches: Mapping[str, StackMatch], vision: str, donor: TensorSource) -> None:
    if next(iter(matches.values())).kept:
        return
    raise ModelMismatchError(
        f"'{vision}' is no vision-language model.",
        expected=f"a text stack and a vision side in {donor.describe()}",
        found="the tensors of a language model alone",
        fix="merge two language models with another method, such as linear",
    )


def _with_head(
    donor: TensorSource, sources: Mapping[str, TensorSource], matches: Mapping[str, StackMatch]
) -> tuple[TensorSource, dict[str, Any], str | None]:
    """Return the vision-language model with a head of its own where another model has one, and what that changes.

    Returns:
        The model, what its `config.json` then says, and the head's name where it had none.
    """
    stack, config = text_stack(donor.entries(), _config(donor)), _config(donor)
    tied = bool(tied_tensors(config, donor.entries())) if config else HEAD not in stack
    own_heads = [role for role in matches if _has_own_head(sources[role])]
    if not tied or not own_heads:
        return donor, {}, None
    changes: dict[str, Any] = {"tie_word_embeddings": False}
    if isinstance(config.get("text_config"), Mapping):
        changes["text_config"] = {**config["text_config"], "tie_word_embeddings": False}
    if HEAD in stack:
        return donor, changes, None
    return AliasedSource(donor, {HEAD: stack[EMBEDDING]}), changes, HEAD


def _has_own_head(source: TensorSource) -> bool:
    config = _config(source)
    return HEAD in text_stack(source.entries(), config) and not (config and tied_tensors(config, source.entries()))


def _stack_of(match: StackMatch, source: TensorSource, names: Mapping[str, str]) -> dict[str, str]:
    """Return for each output tensor of the text stack the tensor of a language model; a tied head is its embedding."""
    stack = text_stack(source.entries(), _config(source))
    own_head = _has_own_head(source)
    found = {}
    for stored, name in names.items():
        if name == HEAD:
            found[stored] = stack[HEAD] if own_head else stack.get(EMBEDDING, match.pairs.get(stored, stored))
        else:
            found[stored] = match.pairs[stored]
    return found


def _own_rows(
    matches: Mapping[str, StackMatch], tokens: Mapping[str, TokenTable | None], table: TensorEntry, vision: str
) -> Ranges:
    """Return the rows that only the vision-language model knows, of all models that are compared with it."""
    own: set[int] = set()
    mine = tokens.get(vision)
    for role, match in matches.items():
        rows = match.rows.get(table.name)
        shared = table.shape[0] if rows is None else rows.shared
        own.update(range(shared, table.shape[0]))
        theirs = tokens.get(role)
        if mine is not None and theirs is not None:
            own.update(_only_seen(mine, theirs, (role, vision), shared))
    return _ranges(sorted(own))


def _only_seen(mine: TokenTable, theirs: TokenTable, roles: tuple[str, str], shared: int) -> list[int]:
    """Return ids below `shared` that the vision-language model gives to a token that the language model lacks.

    Both may put added tokens into spare ids; any other token under two names means two tokenizers.
    """
    ours, others = mine.by_id(), theirs.by_id()
    found = []
    for token_id, token in ours.items():
        if token_id >= shared or others.get(token_id) == token:
            continue
        other = others.get(token_id)
        if other is None or (token in mine.flags and other in theirs.flags):
            found.append(token_id)
            continue
        raise ModelMismatchError(
            f"'{roles[0]}' and '{roles[1]}' have different tokenizers.",
            expected=f"id {token_id} for the token {other!r}, as in '{roles[0]}'",
            found=f"the token {token!r} in '{roles[1]}'",
            fix="use the very language model that the vision-language model was made from",
        )
    return found


def _ranges(rows: Sequence[int]) -> Ranges:
    found: list[tuple[int, int]] = []
    for row in rows:
        if found and found[-1][1] == row:
            found[-1] = (found[-1][0], row + 1)
        else:
            found.append((row, row + 1))
    return tuple(found)


def _notes(match: StackMatch, role: str) -> list[str]:
    lost = [name for name in match.unplaced if not match.untied or len(match.unplaced) > 1]
    return [f"{len(lost)} tensors of '{role}' have no place in the output: {', '.join(lost[:3])}"] if lost else []


def _require_same_settings(first: Mapping[str, Any], second: Mapping[str, Any], roles: tuple[str, str]) -> None:
    """Raise where the two text stacks compute differently from the same weights."""
    one, two = (_text_settings(config) for config in (first, second))
    for name in (*_SAME_SETTINGS, "rotary base", "rotary kind"):
        if name in one and name in two and one[name] != two[name]:
            raise ModelMismatchError(
                f"The text stacks of '{roles[0]}' and '{roles[1]}' compute differently from the same weights.",
                expected=f"{name} {one[name]}, as in '{roles[0]}'",
                found=f"{name} {two[name]} in '{roles[1]}'",
                fix="use the very language model that the vision-language model was made from",
            )


def _text_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    parsed = parse_config(config) if config else None
    if parsed is None:
        return {}
    text = parsed.get_text_config()
    found = {name: value for name in _SAME_SETTINGS if (value := getattr(text, name, None)) is not None}
    if "head_dim" not in found and "num_attention_heads" in found and getattr(text, "hidden_size", None):
        found["head_dim"] = text.hidden_size // text.num_attention_heads
    if not getattr(text, "use_sliding_window", True):
        found.pop("sliding_window", None)
    rope = getattr(text, "rope_parameters", None)
    if isinstance(rope, Mapping) and "rope_theta" in rope:
        kind = rope.get("rope_type", "default")
        found["rotary base"] = float(rope["rope_theta"])
        found["rotary kind"] = "default" if kind in _PLAIN_ROPE else kind
    return found
