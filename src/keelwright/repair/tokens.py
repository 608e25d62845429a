# SPDX-License-Identifier: Apache-2.0
"""Models with different tokens, fitted to each other before an edit: sources, settings and tokenizer of the output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keelwright.core.errors import ConfigError
from keelwright.core.protocols import TensorSource
from keelwright.models.folders import read_json
from keelwright.models.refs import LocalModel
from keelwright.weights.token_files import write_tokenizer
from keelwright.weights.vocabulary import Policy, fit_vocabularies, moved_settings

if TYPE_CHECKING:
    from keelwright.models.loading import LoadedModel

_GENERATION = "generation_config.json"


@dataclass(frozen=True, slots=True)
class Tokens:
    """Models that show the same rows, and what the output says of its tokens."""

    sources: Mapping[str, TensorSource]
    config_changes: Mapping[str, Any] = field(default_factory=dict)
    """Keys of `config.json` that differ from those of the model that lays out the output."""
    generation_changes: Mapping[str, Any] = field(default_factory=dict)
    """The same of `generation_config.json`."""
    tokenizer: Path | None = None
    """The folder whose tokenizer the output takes; None: that of the model that lays it out."""
    notes: tuple[str, ...] = ()


def fit_tokens(
    sources: Mapping[str, TensorSource],
    owners: Mapping[str, LocalModel | LoadedModel | None],
    place: Path,
    *,
    policy: Policy,
    layout_role: str,
    base_role: str,
    donor_role: str | None = None,
    pad_to_multiple_of: int | None = None,
) -> Tokens:
    """Return the models with the same tokens in the same rows.

    Args:
        sources: By role.
        owners: By role the model's files, or the live model; both have a tokenizer.
        place: An empty folder for tokenizer files that no model has; needed until the output is written.
        policy, layout_role, base_role, donor_role, pad_to_multiple_of: As for `fit_vocabularies`.

    Raises:
        KeelwrightError: Whatever `fit_vocabularies` raises.
    """
    folders = {role: _tokenizer_folder(owner, place / f"tokenizer-{n}") for n, (role, owner) in _numbered(owners)}
    fitted = fit_vocabularies(
        sources,
        folders,
        policy=policy,
        layout_role=layout_role,
        base_role=base_role,
        donor_role=donor_role,
        pad_to_multiple_of=pad_to_multiple_of,
    )
    # Under `strict` the tokens are the same, and the template stays that of the model that lays out the output.
    folder = None if policy == "strict" else folders[fitted.tokenizer_role]
    if folder is not None and fitted.tokenizer_files:
        folder = write_tokenizer(folder, fitted.tokenizer_files, place / "united")
    settings = _generation_settings(owners[layout_role])
    changes = moved_settings(
        settings, fitted.moved_ids, fitted.lost_ids, instead=_generation_settings(owners[fitted.tokenizer_role])
    )
    notes = [f"{_GENERATION}: {key} is {changes[key]} in the output, {settings[key]} before" for key in changes]
    return Tokens(fitted.sources, fitted.config_changes, changes, folder, (*fitted.notes, *notes))


def tokens_refused(method: str, why: str) -> ConfigError:
    """Return the error for a method that takes its models' tokens as they are."""
    return ConfigError(
        f"The method '{method}' cannot be given other tokens.",
        expected="models with their own vocabularies, without --vocabulary and --pad-to-multiple-of",
        found=why,
        fix="fit the vocabularies first: keelwright repair linear --vocabulary ..., then repair its output",
    )


def _numbered(owners: Mapping[str, Any]) -> enumerate[tuple[str, Any]]:
    # Keys of recipes hold what no folder may be called.
    return enumerate(owners.items())


def _tokenizer_folder(owner: LocalModel | LoadedModel | None, place: Path) -> Path:
    if isinstance(owner, LocalModel):
        return owner.tokenizer_folder
    if owner is None:
        raise TypeError("a model has files or is live")
    owner.tokenizer.save_pretrained(place)
    return place


def _generation_settings(owner: LocalModel | LoadedModel | None) -> dict[str, Any]:
    if isinstance(owner, LocalModel):
        path = owner.folder / _GENERATION
        return read_json(path, owner.ref.text) if path.is_file() else {}
    settings = owner.module.generation_config if owner is not None else None
    return {} if settings is None else dict(settings.to_dict())
