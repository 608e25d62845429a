# SPDX-License-Identifier: Apache-2.0
"""Tokenizer files that no model has: the base's, with the added tokens of the others."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keelwright.core.errors import ModelMismatchError
from keelwright.core.files import write_atomic
from keelwright.models.folders import read_json
from keelwright.models.token_table import FLAG_NAMES, Flags, TokenTable
from keelwright.weights.companions import copy_tokenizer

_TOKENIZER = "tokenizer.json"
_SETTINGS = "tokenizer_config.json"
_ADDED = "added_tokens.json"


def united_files(
    order: Sequence[str],
    tables: Mapping[str, TokenTable],
    folders: Mapping[str, Path],
    words: Mapping[str, str],
) -> tuple[TokenTable, dict[str, bytes]]:
    """Return the tokens of the first model and then those that only others add, and the files that say so.

    Only added tokens can join: they are split off before the rest of a text is cut into pieces. A piece of another
    vocabulary cannot, because no rule of the first tokenizer would ever make it.

    Args:
        order: Roles; the first one's ids are kept.
        tables: The tokens, by role.
        folders: The tokenizer files, by role.
        words: The user's own words for each model.

    Raises:
        ModelMismatchError: The union cannot be written for these tokenizers.
    """
    first = order[0]
    base = tables[first]
    added: dict[str, Flags] = {}
    for role in order[1:]:
        table = tables[role]
        for token in sorted(table.ids, key=lambda one, ids=table.ids: ids[one]):  # type: ignore[misc]
            flags = table.flags.get(token)
            if token in base.ids:
                if base.flags.get(token) != flags:
                    # A tokenizer cannot hold one string twice.
                    raise _refused(first, role, base, f"{token!r} {table.describe(token)}, other flags", words)
            elif flags is None:
                found = f"{token!r} is part of its {table.kind} vocabulary, not an added token"
                raise _refused(first, role, base, found, words)
            elif added.setdefault(token, flags) != flags:
                raise _refused(first, role, base, f"{token!r} is added with other flags than elsewhere", words)
    if not (folders[first] / _TOKENIZER).is_file():
        raise _refused(first, order[-1], base, f"'{first}' has no {_TOKENIZER} to add tokens to", words)
    ids = {token: base.size + number for number, token in enumerate(added)}
    table = TokenTable({**base.ids, **ids}, {**base.flags, **added}, base.kind, base.rules)
    return table, _files(folders[first], ids, added, words[first])


def write_tokenizer(folder: Path, files: Mapping[str, bytes], out: Path) -> Path:
    """Copy the tokenizer files of a folder, with some of them replaced; return the new folder.

    Args:
        folder: Where they are.
        files: Contents by file name, for example those of a union.
        out: The new folder, for example one that is copied into an output and then dropped.
    """
    out.mkdir(parents=True, exist_ok=True)
    copy_tokenizer(folder, out)
    for name, content in files.items():
        write_atomic(out / name, content)
    return out


def _files(folder: Path, ids: Mapping[str, int], added: Mapping[str, Flags], text: str) -> dict[str, bytes]:
    rows = {token: dict(zip(FLAG_NAMES, flags, strict=True)) for token, flags in added.items()}
    content = read_json(folder / _TOKENIZER, text)
    listed = [*(content.get("added_tokens") or [])]
    listed += [{"id": ids[token], "content": token, **row} for token, row in rows.items()]
    content["added_tokens"] = sorted(listed, key=lambda one: int(one["id"]))
    files = {_TOKENIZER: _json(content)}
    if (folder / _SETTINGS).is_file():
        settings = read_json(folder / _SETTINGS, text)
        if isinstance(settings.get("added_tokens_decoder"), dict):
            for token, row in rows.items():
                settings["added_tokens_decoder"][str(ids[token])] = {"content": token, **row}
            files[_SETTINGS] = _json(settings)
    if (folder / _ADDED).is_file():
        files[_ADDED] = _json({**read_json(folder / _ADDED, text), **ids})
    return files


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _refused(first: str, role: str, base: TokenTable, found: str, words: Mapping[str, str]) -> ModelMismatchError:
    return ModelMismatchError(
        f"The union of the tokens of '{first}' and '{role}' cannot be written as one tokenizer.",
        expected=f"tokens of {base.kind} '{first}' ({words[first]}), and added tokens in '{role}' ({words[role]})",
        found=found,
        fix="take the tokens of one model: the vocabulary policy base or donor",
    )
