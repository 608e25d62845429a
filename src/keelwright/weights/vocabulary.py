# SPDX-License-Identifier: Apache-2.0
"""Models with different vocabularies, shown in one: rows of embedding and head by token, not by number.

A row belongs to a token when the model's tokenizer gives the token that id; any other row is padding (Qwen: 151,665
tokens in 152,064 rows). Tokens are the same when their strings and the flags of added tokens are. The output's tokens
come from a policy:

    strict   all models have the same tokens under the same ids; anything else is an error that lists the tokens
    base     those of the base model
    donor    those of a named model
    union    those of the base, then those that only others have

A row that a model lacks is the base's (its task vector is zero there), else that of the one model that has the token,
else the mean over those that have it; with `missing="mean"` it is the mean over all that have it. Padding keeps the
model's own row where that is padding too, else the base's, else it is the mean of the real rows.

The number of rows, padding included, is the base's: more only where tokens need them or a multiple is asked for.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from keelwright.core.config import require_choice, require_in_range
from keelwright.core.digests import json_digest
from keelwright.core.errors import ConfigError, DataError, ModelMismatchError
from keelwright.core.protocols import TensorEntry, TensorSource
from keelwright.models.dtypes import TORCH_DTYPES
from keelwright.models.headers import FLOAT_DTYPES
from keelwright.models.token_table import TokenTable, read_tokens
from keelwright.weights.numerics import working_dtype
from keelwright.weights.plan import Configured, ties_of
from keelwright.weights.sources import source_digest
from keelwright.weights.token_files import united_files

Policy = Literal["strict", "base", "donor", "union"]
POLICIES: tuple[Policy, ...] = ("strict", "base", "donor", "union")

Missing = Literal["base", "mean"]

_EMBEDDING_ENDS = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
    "embeddings.weight",
)
_HEAD_ENDS = ("lm_head.weight", "lm_head.bias", "embed_out.weight", "output.weight")
_SHOWN_TOKENS = 5
# Rows read at a time where all of them are averaged.
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class Fitted:
    """Models that show the same rows, and what changes beside the weights."""

    sources: Mapping[str, TensorSource]
    """By role, in the order given."""
    config_changes: Mapping[str, Any]
    """Keys of `config.json` that the output states differently from the layout's model."""
    tokenizer_role: str
    """The role whose tokenizer files the output takes."""
    tokenizer_files: Mapping[str, bytes] = field(default_factory=dict)
    """Files to write over that role's: those of a union that no single model has."""
    moved_ids: Mapping[int, int] = field(default_factory=dict)
    """Ids of the layout's tokens that are others in the output; for every setting that names a token by its id."""
    lost_ids: frozenset[int] = frozenset()
    """Ids of the layout's tokens that the output does not have."""
    notes: tuple[str, ...] = ()
    """What a person should know, one line each."""


@dataclass(frozen=True, slots=True)
class Run:
    """Output rows that follow one another in every model that they are taken from."""

    start: int
    count: int
    owners: tuple[tuple[str, int], ...]
    """Roles with the row of the first; the mean over several. Empty: the mean of the model's real rows."""


class GatheredSource:
    """A source whose vocabulary tensors show the output's rows.

    Args:
        role: The role of the source.
        sources: Every source by role, as they are; rows that one lacks come from the others.
        names: The tensors with a vocabulary axis; it is the first one.
        runs: Where the output's rows come from, in order, without gaps.
        real: Whether each output row belongs to a token.
    """

    def __init__(
        self,
        role: str,
        sources: Mapping[str, TensorSource],
        names: frozenset[str],
        runs: tuple[Run, ...],
        real: Tensor,
    ) -> None:
        self.role = role
        self.names = names
        self.runs = runs
        self.real = real
        self._sources = dict(sources)
        self._starts = [run.start for run in runs]
        self._rows = runs[-1].start + runs[-1].count if runs else 0
        self._means: dict[str, Tensor] = {}
        self._ties = {owner: ties_of(source) for owner, source in self._sources.items()}
        self._entries = {
            name: TensorEntry(name, entry.dtype, (self._rows, *entry.shape[1:])) if name in names else entry
            for name, entry in self.inner.entries().items()
        }

    @property
    def inner(self) -> TensorSource:
        """The source as it is."""
        return self._sources[self.role]

    def entries(self) -> Mapping[str, TensorEntry]:
        """Return every tensor; those of the vocabulary with the output's rows."""
        return self._entries

    def describe(self) -> str:
        """Return the user's own words for the source."""
        return self.inner.describe()

    def config_json(self) -> dict[str, Any]:
        """Return the source's `config.json` with the output's number of rows; empty where there is none."""
        config = _config(self.inner)
        return {**config, **size_changes(config, self._rows)}

    def data_digest(self) -> str:
        """Return a digest of the sources that rows come from, and of where each comes from."""
        owners = sorted({self.role, *(owner for run in self.runs for owner, _ in run.owners)})
        inner = {owner: source_digest(self._sources[owner]) for owner in owners}
        places = [[run.start, run.count, run.owners] for run in self.runs]
        kind = "sampled-rows" if any("sampled" in one for one in inner.values()) else "rows"
        return f"{kind}:{json_digest([self.role, inner, places, sorted(self.names), _stretches(self.real)])}"

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return elements `start:stop`: as stored where they are the source's own, in float32 where others fill in."""
        if name not in self.names:
            return self.inner.read(name, start, stop)
        entry = self._entries[name]
        columns = max(1, entry.elements // max(1, self._rows))
        parts = []
        at = start
        index = bisect_right(self._starts, start // columns) - 1
        while at < stop:
            run = self.runs[index]
            upto = min(stop, (run.start + run.count) * columns)
            parts.append(self._of_run(name, run, at - run.start * columns, upto - run.start * columns, columns))
            at, index = upto, index + 1
        own = TORCH_DTYPES[entry.dtype]
        if not parts:
            return torch.empty(0, dtype=own)
        if len(parts) == 1:
            return parts[0]
        if all(one.dtype is own for one in parts):
            return torch.cat(parts)
        return torch.cat([one.to(working_dtype(own)) for one in parts])

    def _of_run(self, name: str, run: Run, start: int, stop: int, columns: int) -> Tensor:
        if not run.owners:
            mean = self._mean_row(name, columns)
            return mean[torch.arange(start, stop) % columns]
        if len(run.owners) == 1:
            return self._from(name, *run.owners[0], start, stop, columns)
        total = torch.zeros(stop - start, dtype=torch.float64)
        for owner, row in run.owners:
            total += self._from(name, owner, row, start, stop, columns)
        return self._narrow(name, total / len(run.owners))

    def _from(self, name: str, owner: str, row: int, start: int, stop: int, columns: int) -> Tensor:
        source = self._sources[owner]
        # A model that ties its head to its embedding has the head's rows there.
        stored = name if name in source.entries() else self._ties[owner].get(name, name)
        return source.read(stored, row * columns + start, row * columns + stop)

    def _mean_row(self, name: str, columns: int) -> Tensor:
        """Return the mean of the rows that belong to tokens; always summed in the same blocks."""
        known = self._means.get(name)
        if known is None:
            total = torch.zeros(columns, dtype=torch.float64)
            for first in range(0, self._rows, _ROWS_AT_ONCE):
                last = min(self._rows, first + _ROWS_AT_ONCE)
                keep = self.real[first:last]
                # Padding is left out before it is read: its own rows may be this very mean.
                for begin, end in _stretches(keep):
                    block = self.read(name, (first + begin) * columns, (first + end) * columns)
                    total += block.double().view(-1, columns).sum(0)
            known = self._means[name] = self._narrow(name, total / max(1, int(self.real.sum())))
        return known

    def _narrow(self, name: str, values: Tensor) -> Tensor:
        return values.to(working_dtype(TORCH_DTYPES[self._entries[name].dtype]))


def fit_vocabularies(
    sources: Mapping[str, TensorSource],
    tokenizer_folders: Mapping[str, Path],
    *,
    policy: Policy = "strict",
    layout_role: str,
    base_role: str,
    donor_role: str | None = None,
    pad_to_multiple_of: int | None = None,
    missing: Missing = "base",
) -> Fitted:
    """Return the models with the same tokens in the same rows.

    Args:
        sources: By role.
        tokenizer_folders: By role: where the tokenizer files are.
        policy: Whose tokens the output has; see the module.
        layout_role: The role that lays out the output; settings are compared with its.
        base_role: The role whose rows fill in, and whose number of rows is kept.
        donor_role: For the policy `donor`; by default the layout's.
        pad_to_multiple_of: Round the number of rows up to a multiple of it.
        missing: What fills a row that a model lacks.

    Raises:
        ConfigError: The policy, the role or the multiple make no sense.
        ModelMismatchError: The models' tokens do not fit together under the policy.
        MissingError, DataError: A tokenizer cannot be read, or its model has no rows for its tokens.
    """
    _require_settings(sources, policy, missing, pad_to_multiple_of, (layout_role, base_role, donor_role))
    rows = {role: vocabulary_rows(source) for role, source in sources.items()}
    tables = {role: read_tokens(tokenizer_folders[role], source.describe()) for role, source in sources.items()}
    for role, table in tables.items():
        _require_rows(sources[role], table, rows[role])
    donor = donor_role or layout_role
    output, tokenizer_role, files = _output_tokens(policy, tables, tokenizer_folders, base_role, donor, sources)
    count = _row_count(output, rows[base_role], pad_to_multiple_of)
    notes = _notes(tables, output, rows, count, sources, tokenizer_role)
    if all(one == count for one in rows.values()) and all(_same(one, output) for one in tables.values()):
        return Fitted(dict(sources), {}, tokenizer_role, notes=notes)
    names = {role: vocabulary_tensors(source) for role, source in sources.items()}
    real = torch.zeros(count, dtype=torch.bool)
    real[list(output.by_id())] = True
    fitted: dict[str, TensorSource] = {}
    for role in sources:
        runs = _runs(role, output, tables, rows, count, base_role, missing)
        fitted[role] = GatheredSource(role, sources, names[role], runs, real)
    moved, lost = _moved(tables[layout_role], output)
    config, donor_config = _config(sources[layout_role]), _config(sources[tokenizer_role])
    settings = moved_settings(config, moved, lost, instead=donor_config)
    changes = {**settings, **size_changes(config, count)}
    for key in settings:
        notes = (*notes, f"config.json: {key} is {settings[key]} in the output, {config[key]} in '{layout_role}'")
    return Fitted(fitted, changes, tokenizer_role, files, moved, lost, notes)


def vocabulary_rows(source: TensorSource) -> int:
    """Return the number of rows of the model's embedding, padding included.

    Raises:
        DataError: No tensor is known to be an embedding.
    """
    entries = source.entries()
    found = [
        one for ends in (_EMBEDDING_ENDS, _HEAD_ENDS) for one in entries.values() if _is_table(one) and _ends(one, ends)
    ]
    sizes = _vocab_sizes(source)
    named = [one for one in found if one.shape[0] in sizes] or found
    if not named:
        raise DataError(
            f"The embedding of '{source.describe()}' is not known.",
            expected=f"a matrix whose name ends in one of {', '.join(_EMBEDDING_ENDS[:4])}",
            found=", ".join([*entries][:3]) or "no tensors",
            fix="merge models with equal vocabularies, or leave the vocabulary policy out",
        )
    return named[0].shape[0]


def vocabulary_tensors(source: TensorSource) -> frozenset[str]:
    """Return the names of the tensors that have a row for each token: embedding and head, and the head's bias."""
    rows = vocabulary_rows(source)
    return frozenset(
        entry.name
        for entry in source.entries().values()
        if entry.dtype in FLOAT_DTYPES
        and entry.shape
        and entry.shape[0] == rows
        and (_ends(entry, _EMBEDDING_ENDS) or _ends(entry, _HEAD_ENDS))
    )


def size_changes(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Return what `config.json` must state differently for so many rows, parts of the model included."""
    changes: dict[str, Any] = {}
    if "vocab_size" in config and config["vocab_size"] != rows:
        changes["vocab_size"] = rows
    for key in ("text_config", "llm_config", "language_config"):
        part = config.get(key)
        if isinstance(part, Mapping) and part.get("vocab_size", rows) != rows:
            changes[key] = {**part, "vocab_size": rows}
    return changes


def moved_settings(
    settings: Mapping[str, Any],
    moved: Mapping[int, int],
    lost: frozenset[int] = frozenset(),
    *,
    instead: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the settings that name tokens by ids that have changed, with the new ones.

    Args:
        settings: `config.json` or `generation_config.json`.
        moved: New id by old one.
        lost: Ids of tokens that are no more. Of a list they are left out; where nothing is left, the setting is
            that of `instead`, or None.
        instead: The same settings of the model whose tokenizer the output has.
    """
    changes: dict[str, Any] = {}
    for key, value in settings.items():
        if not key.endswith(("_token_id", "_token_ids", "_token_index")):
            continue
        ids = value if isinstance(value, list) else [value]
        new = [moved.get(one, one) for one in ids if one not in lost]
        result: Any = (instead or {}).get(key) if not new and ids else new if isinstance(value, list) else new[0]
        if result != value:
            changes[key] = result
    return changes


def _require_settings(
    sources: Mapping[str, TensorSource],
    policy: str,
    missing: str,
    multiple: int | None,
    roles: tuple[str | None, ...],
) -> None:
    require_choice("policy", policy, POLICIES)
    require_choice("missing", missing, ("base", "mean"))
    if multiple is not None:
        require_in_range("pad_to_multiple_of", multiple, low=1)
    unknown = [role for role in roles if role is not None and role not in sources]
    if unknown:
        raise ConfigError(
            f"There is no model '{unknown[0]}' whose vocabulary could be taken.",
            expected=f"one of {', '.join(sources)}",
            found=str(unknown[0]),
            fix="name one of the models that are merged",
        )


def _require_rows(source: TensorSource, table: TokenTable, rows: int) -> None:
    if table.size <= rows:
        return
    beyond = sorted((token_id, token) for token, token_id in table.ids.items() if token_id >= rows)
    raise DataError(
        f"The tokenizer of '{source.describe()}' knows tokens that its embedding has no rows for.",
        expected=f"ids below {rows:,}, the rows of the embedding",
        found=", ".join(f"{token!r} (id {token_id})" for token_id, token in beyond[:_SHOWN_TOKENS])
        + (f" and {len(beyond) - _SHOWN_TOKENS} more" if len(beyond) > _SHOWN_TOKENS else ""),
        fix="use the tokenizer that the model was trained with",
    )


def _output_tokens(
    policy: Policy,
    tables: Mapping[str, TokenTable],
    folders: Mapping[str, Path],
    base: str,
    donor: str,
    sources: Mapping[str, TensorSource],
) -> tuple[TokenTable, str, dict[str, bytes]]:
    """Return the output's tokens, the role whose files define them, and what must be written over these."""
    if policy == "strict":
        for role, table in tables.items():
            if not _same(table, tables[base]):
                raise _different(role, base, tables, sources)
        return tables[base], base, {}
    if policy != "union":
        chosen = base if policy == "base" else donor
        return tables[chosen], chosen, {}
    for role in (base, *(one for one in tables if one != base)):
        # A model whose tokenizer holds everything, the base's tokens under the base's ids, is the union already.
        if all(_within(one, tables[role], keep_ids=other == base) for other, one in tables.items()):
            return tables[role], role, {}
    order = [base, *(role for role in tables if role != base)]
    table, files = united_files(order, tables, folders, {role: one.describe() for role, one in sources.items()})
    return table, base, files


def _same(one: TokenTable, two: TokenTable) -> bool:
    return one.ids == two.ids and one.flags == two.flags


def _within(part: TokenTable, whole: TokenTable, *, keep_ids: bool) -> bool:
    return all(
        whole.same_token(part, token) and (not keep_ids or whole.ids[token] == token_id)
        for token, token_id in part.ids.items()
    )


def _different(
    role: str, base: str, tables: Mapping[str, TokenTable], sources: Mapping[str, TensorSource]
) -> ModelMismatchError:
    one, two = tables[base], tables[role]
    tokens = sorted(
        (token for token in {**one.ids, **two.ids} if one.describe(token) != two.describe(token)),
        key=lambda token: (one.ids.get(token, two.ids.get(token, 0)), token),
    )

    def shown(table: TokenTable) -> str:
        more = f" and {len(tokens) - _SHOWN_TOKENS} more" if len(tokens) > _SHOWN_TOKENS else ""
        return ", ".join(f"{token!r} {table.describe(token)}" for token in tokens[:_SHOWN_TOKENS]) + more

    return ModelMismatchError(
        f"'{base}' and '{role}' do not have the same tokens: {len(tokens)} differ.",
        expected=f"{shown(one)}, as in '{base}' ({sources[base].describe()})",
        found=f"{shown(two)} in '{role}' ({sources[role].describe()})",
        fix="choose whose tokens the output has: the vocabulary policy base, union or donor",
    )


def _row_count(output: TokenTable, base_rows: int, multiple: int | None) -> int:
    count = max(base_rows, output.size)
    return count if multiple is None else -(-count // multiple) * multiple


def _runs(
    role: str,
    output: TokenTable,
    tables: Mapping[str, TokenTable],
    rows: Mapping[str, int],
    count: int,
    base: str,
    missing: Missing,
) -> tuple[Run, ...]:
    """Return where the rows of one model come from."""
    tokens = output.by_id()
    padding = {one: set(range(rows[one])) - set(tables[one].ids.values()) for one in (role, base)}
    runs: list[Run] = []
    for index in range(count):
        token = tokens.get(index)
        if token is None:
            owner = next((one for one in (role, base) if index in padding[one]), None)
            owners: tuple[tuple[str, int], ...] = () if owner is None else ((owner, index),)
        else:
            owners = _owners(role, token, output, tables, base, missing)
        last = runs[-1] if runs else None
        if last is not None and owners == tuple((one, row + last.count) for one, row in last.owners):
            runs[-1] = replace(last, count=last.count + 1)
        else:
            runs.append(Run(index, 1, owners))
    return tuple(runs)


def _owners(
    role: str, token: str, output: TokenTable, tables: Mapping[str, TokenTable], base: str, missing: Missing
) -> tuple[tuple[str, int], ...]:
    if tables[role].same_token(output, token):
        return ((role, tables[role].ids[token]),)
    if missing == "base" and tables[base].same_token(output, token):
        return ((base, tables[base].ids[token]),)
    return tuple((one, table.ids[token]) for one, table in tables.items() if table.same_token(output, token))


def _moved(layout: TokenTable, output: TokenTable) -> tuple[dict[int, int], frozenset[int]]:
    # A string keeps its meaning as an end or a beginning even where its flags differ.
    moved = {
        token_id: output.ids[token]
        for token, token_id in layout.ids.items()
        if token in output.ids and output.ids[token] != token_id
    }
    return moved, frozenset(token_id for token, token_id in layout.ids.items() if token not in output.ids)


def _config(source: TensorSource) -> dict[str, Any]:
    return source.config_json() if isinstance(source, Configured) else {}


def _notes(
    tables: Mapping[str, TokenTable],
    output: TokenTable,
    rows: Mapping[str, int],
    count: int,
    sources: Mapping[str, TensorSource],
    tokenizer_role: str,
) -> tuple[str, ...]:
    notes = []
    for role, table in tables.items():
        left = [token for token in table.ids if token not in output.ids]
        if left:
            notes.append(f"'{role}' has {len(left)} tokens that the output does not have: {_few(left)}")
        filled = [token for token in output.ids if token not in table.ids]
        if filled:
            notes.append(f"'{role}' lacks {len(filled)} tokens of the output, whose rows are filled in: {_few(filled)}")
        other = [token for token in table.ids if token in output.ids and not table.same_token(output, token)]
        if other:
            notes.append(f"'{role}' marks {len(other)} tokens differently, whose rows are not taken: {_few(other)}")
        if rows[role] != count:
            notes.append(f"'{role}' has {rows[role]:,} rows of embedding, the output {count:,}")
        if table.rules != tables[tokenizer_role].rules:
            notes.append(f"'{role}' splits text by other rules than the tokenizer of the output, '{tokenizer_role}'")
    return tuple(notes)


def _few(tokens: list[str]) -> str:
    more = f" and {len(tokens) - _SHOWN_TOKENS} more" if len(tokens) > _SHOWN_TOKENS else ""
    return ", ".join(repr(one) for one in tokens[:_SHOWN_TOKENS]) + more


def _stretches(keep: Tensor) -> list[tuple[int, int]]:
    """Return begin and end of every run of True."""
    steps = torch.diff(keep.int(), prepend=torch.zeros(1, dtype=torch.int32), append=torch.zeros(1, dtype=torch.int32))
    begins = (steps == 1).nonzero().flatten().tolist()
    return list(zip(begins, (steps == -1).nonzero().flatten().tolist(), strict=True))


def _is_table(entry: TensorEntry) -> bool:
    return len(entry.shape) == 2 and entry.dtype in FLOAT_DTYPES


def _ends(entry: TensorEntry, ends: tuple[str, ...]) -> bool:
    # On a dot: vision_embeddings.weight is no embeddings.weight.
    return any(entry.name == end or entry.name.endswith(f".{end}") for end in ends)


def _vocab_sizes(source: TensorSource) -> set[int]:
    config = _config(source)
    parts = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    return {part["vocab_size"] for part in parts if isinstance(part.get("vocab_size"), int)}
