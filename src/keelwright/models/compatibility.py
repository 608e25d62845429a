# SPDX-License-Identifier: Apache-2.0
"""Do two models fit together? Their tensors, settings, tokenizers and chat templates, compared before any load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from keelwright.core.digests import file_digest
from keelwright.core.errors import ModelMismatchError
from keelwright.core.protocols import TensorEntry
from keelwright.models.chat import template_digest
from keelwright.models.configs import parse_config
from keelwright.models.folders import TOKENIZER_FILES, has_tokenizer
from keelwright.models.names import tied_tensors
from keelwright.models.refs import LocalModel
from keelwright.models.sources import open_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_IMMATERIAL = frozenset(
    {
        "_attn_implementation_autoset",
        "_commit_hash",
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "label2id",
        "max_position_embeddings",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "quantization_config",
        "return_dict",
        "tie_word_embeddings",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "vocab_size",
    }
)
"""Settings that do not change what the same weights compute; the vocabulary and the ties are compared as tensors."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One setting, tensor or token that differs."""

    name: str
    first: str
    second: str


@dataclass(frozen=True, slots=True)
class Compatibility:
    """Everything in which two models differ; each list is empty where they agree."""

    tensors: int
    """Number of tensors of the first model."""
    second_tensors: int
    only_first: tuple[str, ...]
    """Tensors that only the first model has; a tied tensor that one model leaves out does not count."""
    only_second: tuple[str, ...]
    shapes: tuple[Difference, ...]
    dtypes: tuple[Difference, ...]
    """No obstacle: every dtype is widened."""
    settings: tuple[Difference, ...]
    """Settings in `config.json` that change what the weights compute."""
    tokens: tuple[Difference, ...]
    """Tokens with another id, with other flags, or that one model lacks."""
    tokenizer_rules: bool
    """Whether equal vocabularies are applied by different rules (merges, normalisation, splitting)."""
    template: bool
    """Whether the chat templates differ."""
    templates: tuple[str, str] = ("none", "none")
    """Digests of the chat templates."""

    @property
    def is_identical(self) -> bool:
        """Whether nothing differs but values."""
        lists = (self.only_first, self.only_second, self.shapes, self.dtypes, self.settings, self.tokens)
        return not any(lists) and not self.tokenizer_rules and not self.template


def compare_models(first: LocalModel, second: LocalModel) -> Compatibility:
    """Compare two models by their headers, settings, tokenizers and chat templates; no weights are read.

    Raises:
        KeelwrightError: One of them is not a usable model; see `open_source`.
    """
    sources = (open_source(first), open_source(second))
    entries = (sources[0].entries(), sources[1].entries())
    configs = (sources[0].config_json(), sources[1].config_json())
    tied = (tied_tensors(configs[0]), tied_tensors(configs[1]))
    tokenizers = _tokenizers(first, second)
    shared = [name for name in entries[0] if name in entries[1]]
    templates = [template_digest(one) if one is not None else "none" for one in tokenizers]
    return Compatibility(
        tensors=len(entries[0]),
        second_tensors=len(entries[1]),
        only_first=_only(entries[0], entries[1], tied[1]),
        only_second=_only(entries[1], entries[0], tied[0]),
        shapes=_differences({name: (list(entries[0][name].shape), list(entries[1][name].shape)) for name in shared}),
        dtypes=_differences({name: (entries[0][name].dtype, entries[1][name].dtype) for name in shared}),
        settings=_compare_settings(*configs),
        tokens=_compare_tokens(*tokenizers),
        tokenizer_rules=_rules(tokenizers[0]) != _rules(tokenizers[1]),
        template=templates[0] != templates[1],
        templates=(templates[0], templates[1]),
    )


def require_compatible(
    first: LocalModel,
    second: LocalModel,
    roles: tuple[str, str] = ("aligned", "tuned"),
    *,
    allow_template_change: bool = False,
    same_vocabulary: bool = True,
) -> Compatibility:
    """Raise `ModelMismatchError` unless the second model can have come from the first by tuning.

    Args:
        first: The model that came before.
        second: The model that came after.
        roles: What they are called in error texts.
        allow_template_change: Accept different chat templates.
        same_vocabulary: Refuse different tokens and different rows for them; False where the vocabularies are fitted
            to each other, which looks closer.

    Returns:
        What differs all the same: dtypes, and the template where that is allowed.
    """
    found = compare_models(first, second)
    names = [f"'{role}' ({model.ref.text})" for role, model in zip(roles, (first, second), strict=True)]
    pair = f"'{roles[0]}' and '{roles[1]}'"
    kind = next((one for one in found.settings if one.name == "model_type"), None)
    if kind is not None:
        raise ModelMismatchError(
            f"{pair} are of different architectures.",
            expected=f"{kind.first}, as in {names[0]}",
            found=f"{kind.second} in {names[1]}",
            fix="pass two models of which one was made from the other",
        )
    if not same_vocabulary:
        found = replace(found, shapes=(), tokens=(), tokenizer_rules=False)
    _require_same_tensors(found, pair, names, roles, second)
    if found.settings:
        raise ModelMismatchError(
            f"{pair} compute differently from the same weights.",
            expected=", ".join(f"{one.name} {one.first}" for one in found.settings[:3]) + f", as in {names[0]}",
            found=", ".join(f"{one.name} {one.second}" for one in found.settings[:3]) + f" in {names[1]}",
            fix="copy config.json from the model that the other was made from",
        )
    _require_same_tokenizer(found, pair, names)
    if found.template and not allow_template_change:
        raise ModelMismatchError(
            f"{pair} have different chat templates; a changed template alone can change safety.",
            expected=f"template {found.templates[0]}, as in {names[0]}",
            found=f"template {found.templates[1]} in {names[1]}",
            fix="copy chat_template.jinja and tokenizer_config.json from the aligned model, "
            "or pass --allow-template-change to measure each model with its own",
        )
    return found


def _require_same_tensors(
    found: Compatibility, pair: str, names: list[str], roles: tuple[str, str], second: LocalModel
) -> None:
    if found.only_first or found.only_second:
        parts = [f"{found.second_tensors} in {names[1]}"]
        for role, only in zip(roles, (found.only_first, found.only_second), strict=True):
            if only:
                parts.append(f"only in '{role}': {_shown(only)}")
        adapter = any("lora_" in name for name in (*found.only_first, *found.only_second))
        raise ModelMismatchError(
            f"{pair} do not have the same tensors.",
            expected=f"{found.tensors} tensors as in {names[0]}",
            found="; ".join(parts),
            fix=f"'{roles[1]}' looks like an adapter: pass it as base+adapter"
            if adapter
            else f"pass the model that '{second.ref.text}' was made from",
        )
    if found.shapes:
        one = found.shapes[0]
        raise ModelMismatchError(
            f"{pair} have tensors of different shapes.",
            expected=f"{one.name} {one.first}, as in {names[0]}",
            found=f"{one.second} in {names[1]}" + _others(found.shapes),
            fix="tokens were added while tuning: fit them with keelwright repair --vocabulary base, donor or union"
            if "embed" in one.name or "lm_head" in one.name
            else f"pass the model that '{second.ref.text}' was made from",
        )


def _require_same_tokenizer(found: Compatibility, pair: str, names: list[str]) -> None:
    fix = "tune with the tokenizer of the aligned model, or copy its tokenizer files if the tuning used them"
    if found.tokens:
        one = found.tokens[0]
        raise ModelMismatchError(
            f"{pair} have different tokenizers.",
            expected=f"token {one.name!r}: {one.first}, as in {names[0]}",
            found=f"{one.second} in {names[1]}" + _others(found.tokens),
            fix=fix,
        )
    if found.tokenizer_rules:
        raise ModelMismatchError(
            f"{pair} have the same tokens, but split text by different rules.",
            expected=f"the tokenizer.json of {names[0]}",
            found=f"another one in {names[1]}",
            fix=fix,
        )


def _only(
    mine: Mapping[str, TensorEntry], others: Mapping[str, TensorEntry], tied: Mapping[str, str]
) -> tuple[str, ...]:
    """Return the tensors that the other model has neither stored nor tied to a stored one."""
    partners = {**tied, **{partner: name for name, partner in tied.items()}}
    return tuple(name for name in mine if name not in others and partners.get(name) not in others)


def _differences(pairs: Mapping[str, tuple[Any, Any]]) -> tuple[Difference, ...]:
    return tuple(Difference(name, str(one), str(two)) for name, (one, two) in pairs.items() if one != two)


def _compare_settings(first: dict[str, Any], second: dict[str, Any]) -> tuple[Difference, ...]:
    """Compare the settings that the architecture knows, defaults filled in; other programs' notes do not count."""
    if _material(first) == _material(second):
        return ()
    one, two = parse_config(first), parse_config(second)
    if one is None or two is None or type(one) is not type(two):
        return _differences({"model_type": (first.get("model_type"), second.get("model_type"))})
    settings = (one.to_dict(), two.to_dict())
    names = sorted(name for name in type(one)().to_dict() if name not in _IMMATERIAL and "drop" not in name)
    return _differences({name: (settings[0].get(name), settings[1].get(name)) for name in names})


def _material(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in _IMMATERIAL}


def _compare_tokens(
    first: PreTrainedTokenizerBase | None, second: PreTrainedTokenizerBase | None
) -> tuple[Difference, ...]:
    if first is None or second is None:
        if first is second:
            return ()
        return (Difference("(any)", *("no tokenizer" if one is None else "a tokenizer" for one in (first, second))),)
    one, two = first.get_vocab(), second.get_vocab()
    tokens = sorted({*one, *two}, key=lambda token: (one.get(token, two.get(token, 0)), token))
    ids = _differences({token: (_id_words(one.get(token)), _id_words(two.get(token))) for token in tokens})
    flags = (_flags(first), _flags(second))
    marked = _differences(
        {token: (flags[0].get(token, "plain"), flags[1].get(token, "plain")) for token in {**flags[0], **flags[1]}}
    )
    roles = _differences(
        {
            f"({role})": (str(first.special_tokens_map.get(role)), str(second.special_tokens_map.get(role)))
            for role in ("bos_token", "eos_token", "unk_token")
        }
    )
    known = {one.name for one in ids}
    return (*ids, *(one for one in marked if one.name not in known), *roles)


def _id_words(token_id: int | None) -> str:
    return "absent" if token_id is None else f"id {token_id}"


def _flags(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    return {
        str(token): f"special {token.special}, normalised {token.normalized}, strips {token.lstrip}/{token.rstrip}"
        for token in tokenizer.added_tokens_decoder.values()
    }


def _tokenizers(first: LocalModel, second: LocalModel) -> list[PreTrainedTokenizerBase | None]:
    """Return the models' tokenizers, or twice None where their files are the same and there is nothing to compare."""
    if _tokenizer_files(first) == _tokenizer_files(second):
        return [None, None]
    from keelwright.models.loading import load_tokenizer

    return [load_tokenizer(one) if has_tokenizer(one.tokenizer_folder) else None for one in (first, second)]


def _tokenizer_files(model: LocalModel) -> dict[str, str]:
    folder = model.tokenizer_folder
    paths = (path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file())
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in paths}


def _rules(tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    """Return how a fast tokenizer splits text, without its vocabulary, padding and truncation."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    settings = json.loads(backend.to_str())
    for name in ("padding", "truncation", "added_tokens", "version"):
        settings.pop(name, None)
    settings.get("model", {}).pop("vocab", None)
    return json.dumps(settings, sort_keys=True)


def _shown(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _others(differences: tuple[Difference, ...]) -> str:
    return f"; {len(differences) - 1} more differ" if len(differences) > 1 else ""
