# SPDX-License-Identifier: Apache-2.0
"""The tokens of a model folder: strings, ids and the flags of added tokens, read from its files without a tokenizer.

Two tokens are the same when their strings and their flags are: the id is a model's own affair.

Not seen are tokens that transformers would give a new id on loading because `special_tokens_map.json` alone names
them: no row of any model was trained for such an id.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keelwright.core.errors import DataError, MissingError
from keelwright.models.folders import read_json, shown_files

Flags = tuple[bool, bool, bool, bool, bool]
"""Of an added token: special, normalised, single word, strips on the left, strips on the right."""

FLAG_NAMES = ("special", "normalized", "single_word", "lstrip", "rstrip")
_TOKENIZER = "tokenizer.json"
_SETTINGS = "tokenizer_config.json"


@dataclass(frozen=True, slots=True)
class TokenTable:
    """The vocabulary of one model."""

    ids: Mapping[str, int]
    """Id of every token, added ones included."""
    flags: Mapping[str, Flags]
    """Of the added tokens."""
    kind: str
    """What the tokenizer is built on: BPE, Unigram, WordPiece, WordLevel, or the name of a file."""
    rules: str
    """How text is split and joined, as JSON, without the tokens; empty where the files do not say."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def size(self) -> int:
        """One more than the highest id."""
        return max(self.ids.values(), default=-1) + 1

    def by_id(self) -> dict[int, str]:
        """Return the token of each id; of two with one id the added one, which is what text is split at."""
        found = {token_id: token for token, token_id in self.ids.items()}
        found.update({self.ids[token]: token for token in self.flags})
        return found

    def same_token(self, other: TokenTable, token: str) -> bool:
        """Tell whether both know the token, with the same flags."""
        return token in self.ids and token in other.ids and self.flags.get(token) == other.flags.get(token)

    def describe(self, token: str) -> str:
        """Return the token's id and flags in words."""
        if token not in self.ids:
            return "absent"
        flags = self.flags.get(token)
        if flags is None:
            return f"id {self.ids[token]}"
        named = ", ".join(name for name, value in zip(FLAG_NAMES, flags, strict=True) if value)
        return f"id {self.ids[token]} (added{': ' + named if named else ''})"


def read_tokens(folder: Path, text: str | None = None) -> TokenTable:
    """Return the tokens that the tokenizer files of a folder define.

    Args:
        folder: Holds `tokenizer.json`, or `vocab.json` or `vocab.txt` with what was added to them.
        text: The user's own words for it.

    Raises:
        MissingError: There is no tokenizer, or only one that cannot be read without its own library.
        DataError: A file is damaged.
    """
    text = text or str(folder)
    if (folder / _TOKENIZER).is_file():
        return _from_tokenizer(read_json(folder / _TOKENIZER, text), _added_settings(folder, text), text)
    if (folder / "vocab.json").is_file():
        ids = read_json(folder / "vocab.json", text)
        return _table(ids, _added_settings(folder, text), "BPE", _text_of(folder / "merges.txt"), text)
    if (folder / "vocab.txt").is_file():
        lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
        ids = {token: index for index, token in enumerate(lines)}
        return _table(ids, _added_settings(folder, text), "WordPiece", "", text)
    raise MissingError(
        f"The tokens of '{text}' cannot be read.",
        expected=f"{_TOKENIZER}, vocab.json or vocab.txt in {folder}",
        found=shown_files(folder) if folder.is_dir() else "no such folder",
        fix="load its tokenizer with transformers and save it again, which writes tokenizer.json",
    )


def _from_tokenizer(content: Mapping[str, Any], settings: Mapping[str, tuple[int, Flags]], text: str) -> TokenTable:
    model = content.get("model")
    vocab = model.get("vocab") if isinstance(model, Mapping) else None
    if not isinstance(model, Mapping) or not isinstance(vocab, dict | list):
        raise _damaged(text, "a model with a vocabulary", type(vocab).__name__)
    if isinstance(vocab, dict):
        ids = dict(vocab)
    else:
        # Unigram lists pairs of token and score; the place is the id.
        try:
            ids = {str(token): index for index, (token, _) in enumerate(vocab)}
        except (TypeError, ValueError) as error:
            raise _damaged(text, "pairs of token and score", str(error)) from error
    added = dict(settings)
    for one in content.get("added_tokens") or ():
        if not isinstance(one, Mapping) or "content" not in one or type(one.get("id")) is not int:
            raise _damaged(text, "added tokens with id and content", repr(one)[:80])
        # tokenizer.json is what encodes: where the settings say otherwise, it wins.
        added[str(one["content"])] = (int(one["id"]), _flags(one))
    rules = {key: value for key, value in content.items() if key not in ("added_tokens", "model", "padding", "version")}
    rules.pop("truncation", None)
    rest = {key: value for key, value in model.items() if key != "vocab"}
    kind = str(model.get("type") or ("Unigram" if isinstance(vocab, list) else "BPE"))
    return _table(ids, added, kind, json.dumps([rules, rest], sort_keys=True, ensure_ascii=False), text)


def _table(
    ids: Mapping[str, Any], added: Mapping[str, tuple[int, Flags]], kind: str, rules: str, text: str
) -> TokenTable:
    if not all(type(one) is int and one >= 0 for one in ids.values()):
        raise _damaged(text, "ids that are whole numbers of 0 or more", "others")
    every = {**ids, **{token: token_id for token, (token_id, _) in added.items()}}
    return TokenTable(every, {token: flags for token, (_, flags) in added.items()}, kind, rules)


def _added_settings(folder: Path, text: str) -> dict[str, tuple[int, Flags]]:
    """Return the tokens that the settings add, which matter where tokenizer.json does not hold them."""
    added: dict[str, tuple[int, Flags]] = {}
    if (folder / "added_tokens.json").is_file():
        # What no other file says: added tokens of the older format are split off and not normalised.
        plain = (False, False, False, False, False)
        added.update((token, (int(one), plain)) for token, one in read_json(folder / "added_tokens.json", text).items())
    if (folder / _SETTINGS).is_file():
        decoder = read_json(folder / _SETTINGS, text).get("added_tokens_decoder")
        for token_id, one in (decoder if isinstance(decoder, dict) else {}).items():
            if not isinstance(one, Mapping) or "content" not in one or not str(token_id).isdigit():
                raise _damaged(text, "ids with the content and the flags of added tokens", repr(one)[:80], _SETTINGS)
            added[str(one["content"])] = (int(token_id), _flags(one))
    return added


def _flags(one: Mapping[str, Any]) -> Flags:
    special, normalized, single, left, right = (bool(one.get(name, False)) for name in FLAG_NAMES)
    return (special, normalized, single, left, right)


def _text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _damaged(text: str, expected: str, found: str, file: str = _TOKENIZER) -> DataError:
    return DataError(
        f"The {file} of '{text}' is damaged.",
        expected=expected,
        found=found,
        fix="download or copy the file again",
    )
