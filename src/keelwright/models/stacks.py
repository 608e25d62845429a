# SPDX-License-Identifier: Apache-2.0
"""Where the text stack of a vision-language model lies, and which tensor of a language model belongs to which of it.

One model has several spellings. An old LLaVA file, and what transformers 5 writes for LLaVA, says
`language_model.model.layers.0...` and `language_model.lm_head.weight`; the module in memory, and files of transformers
4.52 and later, say `model.language_model.layers.0...` and `lm_head.weight`; a language model, and the files of
Qwen2-VL, say `model.layers.0...`. The *text name* of a tensor is its name in a language model alone. It is found

1. by transformers' own conversion table, where the installed version has one for the architecture, which gives the name
   that the current class uses;
2. by our rules on that name;
3. for tensors of a language model that are still not found: by the one prefix under which the checkpoint holds most of
   them, in equal shapes, where the longest prefix wins among equals.

Everything here works on names and shapes: no values are read. A text stack must be covered whole, in both directions;
names that silently do not overlap would make a merge that does nothing.

Source: the spellings are those of transformers 5.23 (`conversion_mapping.py`, Apache-2.0).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from keelwright.core.errors import ModelMismatchError
from keelwright.core.protocols import TensorEntry
from keelwright.models.configs import parse_config

EMBEDDING: Final = "model.embed_tokens.weight"
"""Text name of the input embedding."""

HEAD: Final = "lm_head.weight"
"""Text name of the output head."""

_RULES: Final = (
    (re.compile(r"^(?:model\.)?language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^lm_head\."), "lm_head."),
    (re.compile(r"^(?:model\.)?language_model\.model\."), "model."),
    (re.compile(r"^(?:model\.)?(?:language_model|text_model)\."), "model."),
    (re.compile(r"^(?:model\.)?(?=(?:embed_tokens|layers|norm)\.)"), "model."),
)
"""What stands before a text tensor's name, and what a language model writes there; the first that fits is applied."""

_BUFFERS: Final = re.compile(r"\.(?:rotary_emb\.inv_freq|masked_bias|attn\.bias)$")
"""Tables that old versions stored and that are computed today: no weights."""

_SHOWN: Final = 3


@dataclass(frozen=True, slots=True)
class SharedRows:
    """How far the vocabularies of two tables go together."""

    shared: int
    """Rows that both have: those from 0."""
    vision: int
    """Rows of the vision-language model's table; those from `shared` on are its own (image tokens) and are kept."""
    text: int
    """Rows of the language model's table; those from `shared` on have no place in the output."""


@dataclass(frozen=True, slots=True)
class StackMatch:
    """Which tensor of a vision-language model belongs to which tensor of a language model. Names as stored."""

    pairs: Mapping[str, str]
    """For each tensor of the text stack, the language model's tensor; in the vision-language model's order."""
    kept: tuple[str, ...]
    """Tensors that only the vision-language model has: vision tower, projector, and what `partial` left out."""
    rows: Mapping[str, SharedRows]
    """Vocabulary tables, by the vision-language model's name, whose numbers of rows differ."""
    text_names: Mapping[str, str]
    """Text name of each tensor in `pairs`: the key for layers and for random numbers, independent of spelling."""
    unplaced: tuple[str, ...] = ()
    """Tensors of the language model without a place: with `partial`, or the head that `untied` speaks of."""
    untied: bool = False
    """The language model has a head of its own and the vision-language model ties its head to the embedding: a merge
    has to write a head and untie the output, or leave the head out."""

    @property
    def coverage(self) -> float:
        """Share of the two text stacks' tensors that found each other, 0 to 1."""
        return len(self.pairs) / (len(self.pairs) + len(self.unplaced)) if self.pairs else 0.0


def canonical_names(entries: Mapping[str, TensorEntry], config: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Return, for each stored name, the name that the current transformers class gives the tensor.

    Args:
        entries: The checkpoint's tensors.
        config: Its `config.json`; without one, or where transformers has no table for it, names stay as stored.
    """
    rename = _renamer(config)
    return {name: rename(name) for name in entries}


def text_stack(entries: Mapping[str, TensorEntry], config: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Return the tensors of the text stack: for each text name the stored name.

    Args:
        entries: Tensors of a vision-language model, or of a language model.
        config: Its `config.json`, where there is one.

    Raises:
        ModelMismatchError: Two stored tensors have the same text name.
    """
    found: dict[str, str] = {}
    for stored, canonical in canonical_names(entries, config).items():
        name = text_name(canonical)
        if name is None:
            continue
        if name in found:
            raise ModelMismatchError(
                "Two tensors of a checkpoint are the same tensor of its text stack.",
                expected=f"one tensor for '{name}'",
                found=f"{found[name]}, {stored}",
                fix="use a checkpoint with one language model, in one naming",
            )
        found[name] = stored
    return found


def text_name(name: str) -> str | None:
    """Return a tensor's name in a language model alone; None where it is not of the text stack."""
    if _BUFFERS.search(name):
        return None
    for pattern, prefix in _RULES:
        if pattern.match(name):
            return pattern.sub(prefix, name, count=1)
    return None


def match_text_stack(
    vision: Mapping[str, TensorEntry],
    text: Mapping[str, TensorEntry],
    *,
    vision_config: Mapping[str, Any] | None = None,
    text_config: Mapping[str, Any] | None = None,
    partial: bool = False,
    names: tuple[str, str] = ("tuned", "aligned"),
) -> StackMatch:
    """Match the text stack of a vision-language model with that of a language model, or of another such model.

    Args:
        vision: Tensors of the vision-language model.
        text: Tensors of the language model.
        vision_config: Its `config.json`; tells the table of names, and whether head and embedding are tied.
        text_config: That of the language model.
        partial: Leave out what does not match, instead of refusing.
        names: The two models in the user's words, for error texts.

    Returns:
        The pairs, what is kept, and where the vocabularies differ. Rows are matched by position: whether the same
        position is the same token is for the tokenizers to say.

    Raises:
        ModelMismatchError: A tensor of either text stack has no counterpart, or shapes differ beyond the vocabulary.
    """
    ours, theirs = text_stack(vision, vision_config), text_stack(text, text_config)
    if not theirs:
        theirs = {name: name for name in text if not _BUFFERS.search(name)}
    ours = _by_suffix(ours, vision, theirs, text)
    tied_ours, tied_theirs = _is_tied(ours, vision_config), _is_tied(theirs, text_config)
    if HEAD in ours and HEAD not in theirs and tied_theirs and EMBEDDING in theirs:
        # A tied language model's head is its embedding.
        theirs = {**theirs, HEAD: theirs[EMBEDDING]}
    untied = HEAD in theirs and HEAD not in ours and tied_ours and not tied_theirs
    extra_head = HEAD in theirs and HEAD not in ours and tied_ours
    missing = [theirs[name] for name in theirs if name not in ours and not (name == HEAD and extra_head)]
    stray = [ours[name] for name in ours if name not in theirs]
    odd = [name for name in ours if name in theirs and not _fits(name, vision[ours[name]], text[theirs[name]])]
    if not partial:
        _require_covered(missing, stray, names)
        _require_shapes([(vision[ours[name]], text[theirs[name]]) for name in odd], names)
    matched = {ours[name]: name for name in ours if name in theirs and name not in odd}
    ordered = {stored: matched[stored] for stored in vision if stored in matched}
    if not ordered:
        raise ModelMismatchError(
            f"'{names[0]}' and '{names[1]}' share no tensor of a text stack.",
            expected="a vision-language model and the language model that it was made from",
            found=f"{len(vision)} and {len(text)} tensors without a counterpart",
            fix="check that both are what they are said to be",
        )
    pairs = {stored: theirs[name] for stored, name in ordered.items()}
    rows = {
        stored: SharedRows(min(mine, other), mine, other)
        for stored, name in ordered.items()
        if name in (EMBEDDING, HEAD) and (mine := vision[stored].shape[0]) != (other := text[theirs[name]].shape[0])
    }
    placed = set(pairs.values())
    lost = tuple(
        stored for name, stored in theirs.items() if stored not in placed and not (name == HEAD and tied_theirs)
    )
    kept = tuple(stored for stored in vision if stored not in pairs)
    return StackMatch(pairs, kept, rows, ordered, lost, untied)


def _by_suffix(
    ours: dict[str, str], vision: Mapping[str, TensorEntry], theirs: Mapping[str, str], text: Mapping[str, TensorEntry]
) -> dict[str, str]:
    """Return `ours` with the tensors added that no rule knows and one prefix explains.

    One prefix for all of them, so that a tensor of the vision tower, whose layers may be named alike, is not taken for
    one of the text stack.
    """
    wanted = [name for name in theirs if name not in ours and name != HEAD]
    taken = set(ours.values())
    free: dict[str, list[str]] = {}
    for stored in vision:
        if stored in taken or _BUFFERS.search(stored):
            continue
        for name in wanted:
            body = name.removeprefix("model.")
            named_alike = stored == body or stored.endswith("." + body)
            if named_alike and _fits(name, vision[stored], text[theirs[name]]):
                free.setdefault(stored[: len(stored) - len(body)], []).append(name)
    if not free:
        return ours
    best = max(free, key=lambda prefix: (len(free[prefix]), len(prefix)))
    return ours | {name: best + name.removeprefix("model.") for name in free[best]}


def _fits(name: str, ours: TensorEntry, theirs: TensorEntry) -> bool:
    """Say whether the shapes agree; the two vocabulary tables may differ in their rows."""
    if name in (EMBEDDING, HEAD) and len(ours.shape) == len(theirs.shape) == 2:
        return ours.shape[1] == theirs.shape[1]
    return ours.shape == theirs.shape


def _is_tied(stack: Mapping[str, str], config: Mapping[str, Any] | None) -> bool:
    """Say whether a model's head is its embedding: as its settings say, else where it stores no head."""
    parsed = parse_config(config) if config else None
    if parsed is not None:
        tied = [getattr(one, "tie_word_embeddings", None) for one in (parsed, parsed.get_text_config())]
        if any(one is not None for one in tied):
            return any(tied)
    return HEAD not in stack


def _renamer(config: Mapping[str, Any] | None) -> Callable[[str], str]:
    """Return the function from a stored name to the current class's name."""
    parsed = parse_config(config) if config else None
    if parsed is None:
        return str
    try:
        import torch
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:
        # An older or newer transformers keeps its table elsewhere; our own rules know the common spellings.
        return str
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    kinds = (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING)
    kind = next((mapping[type(parsed)] for mapping in kinds if type(parsed) in mapping), None)
    if kind is None:
        return str
    with torch.device("meta"):
        module = kind(parsed)
    table = [one for one in get_model_conversion_mapping(module) if isinstance(one, WeightRenaming)]
    known, prefix = module.state_dict(), module.base_model_prefix
    by_text_name = {text_name(name): name for name in known}

    def rename(name: str) -> str:
        if name in known:
            return name
        renamed = str(rename_source_key(name, table, [], prefix, known)[0])
        return renamed if renamed in known else by_text_name.get(text_name(renamed) or "", renamed)

    return rename


def _require_covered(missing: Iterable[str], stray: Iterable[str], names: tuple[str, str]) -> None:
    lacking, extra = list(missing), list(stray)
    if not lacking and not extra:
        return
    parts = [
        f"{len(found)} only in '{where}': {', '.join(found[:_SHOWN])}{', ...' if len(found) > _SHOWN else ''}"
        for found, where in ((extra, names[0]), (lacking, names[1]))
        if found
    ]
    raise ModelMismatchError(
        f"The text stacks of '{names[0]}' and '{names[1]}' do not cover each other.",
        expected="every tensor of one text stack in the other",
        found="; ".join(parts),
        fix="use the very language model that the vision-language model was made from, or allow a partial match",
    )


def _require_shapes(odd: list[tuple[TensorEntry, TensorEntry]], names: tuple[str, str]) -> None:
    if odd:
        ours, theirs = odd[0]
        raise ModelMismatchError(
            f"The text stacks of '{names[0]}' and '{names[1]}' have other shapes.",
            expected=f"'{ours.name}' of shape {list(ours.shape)}, as in '{names[0]}'",
            found=f"'{theirs.name}' of shape {list(theirs.shape)} in '{names[1]}' ({len(odd)} such tensors)",
            fix="use the very language model that the vision-language model was made from",
        )
