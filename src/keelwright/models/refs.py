# SPDX-License-Identifier: Apache-2.0
"""How a user names a model, and the files on this disk that the name stands for."""

from __future__ import annotations

import importlib.resources
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from keelwright.core.config import nearest
from keelwright.core.errors import ConfigError, MissingError
from keelwright.models.folders import has_tokenizer, require_folder

if TYPE_CHECKING:
    from torch import nn

    from keelwright.models.loading import LoadedModel

_HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)
_LAB = "lab:"


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model as the user named it; nothing is opened yet."""

    text: str
    """The user's own words."""
    kind: Literal["hub", "folder", "lab", "live"]
    place: str
    """Hub id, folder, or the name of a shipped organism (`workshop/aligned`)."""
    revision: str | None = None
    adapters: tuple[str, ...] = ()
    """Folders or hub ids after `+`."""
    live: LoadedModel | None = None


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model whose files are on this disk."""

    ref: ModelRef
    folder: Path
    adapter_folders: tuple[Path, ...] = ()

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer and the chat template are: with the last adapter that brings its own, else the base."""
        return next((one for one in reversed(self.adapter_folders) if has_tokenizer(one)), self.folder)


def parse_ref(model: str | Path | ModelRef | LoadedModel | nn.Module) -> ModelRef:
    """Return the reference that `model` stands for.

    Args:
        model: `org/name`, `org/name@revision`, a folder, `folder+adapter`, `lab:workshop/aligned`, a path, or a
            model in memory. A folder that exists wins over a hub id of the same spelling.

    Raises:
        MissingError: The text is neither an existing folder nor a possible hub id.
        ConfigError: The text is empty, or a bare module comes without a tokenizer.
    """
    if isinstance(model, ModelRef):
        return model
    if isinstance(model, Path):
        return ModelRef(text=str(model), kind="folder", place=str(model))
    if not isinstance(model, str):
        return _live_ref(model)
    text = model.strip()
    first, *adapters = _split_adapters(text)
    if not first or not all(adapters):
        raise ConfigError(
            "A model's name is empty.",
            expected="a hub id, a folder, folder+adapter or lab:world/name",
            found=repr(model),
            fix="write the model's name, without a '+' at either end",
        )
    if first.startswith(_LAB):
        return ModelRef(text, "lab", first.removeprefix(_LAB), adapters=tuple(adapters))
    place, revision = _place_and_revision(first)
    for adapter in adapters:
        _place_and_revision(adapter)
    kind: Literal["hub", "folder"] = "folder" if _exists(place) else "hub"
    return ModelRef(text, kind, place, revision, tuple(adapters))


def resolve(ref: ModelRef, *, offline: bool) -> LocalModel:
    """Return the folders that a reference stands for, downloading a hub model when that is allowed.

    Args:
        ref: The reference; live ones are refused.
        offline: Never use the network.

    Raises:
        MissingError: There is no such folder, organism, hub model or revision.
        OfflineError: A hub model is not in the cache and the network is not allowed.
        ConfigError: The model is live, so it has no files.
    """
    if ref.kind == "live":
        raise ConfigError(
            f"'{ref.text}' is a model in memory; this needs files.",
            expected="a hub id, a folder, folder+adapter or lab:world/name",
            found="a live module",
            fix="save it with save_pretrained and pass the folder",
        )
    if ref.kind == "lab":
        folder = _organism(ref.place)
    elif ref.kind == "hub":
        folder = _download(ref.place, ref.revision, offline=offline)
    else:
        folder = Path(ref.place).expanduser()
        require_folder(folder, ref.text)
    return LocalModel(ref, folder, tuple(_adapter_folder(adapter, offline=offline) for adapter in ref.adapters))


def _live_ref(model: LoadedModel | nn.Module) -> ModelRef:
    # The import waits: naming a model must not load torch.
    from keelwright.models.loading import LoadedModel, wrap_module

    loaded = model if isinstance(model, LoadedModel) else wrap_module(model)
    return ModelRef(loaded.name, "live", loaded.name, loaded.revision, live=loaded)


def _split_adapters(text: str) -> list[str]:
    """Split at `+`, but not inside the name of a path that exists."""
    pieces = text.split("+")
    parts: list[str] = []
    while pieces:
        existing = (count for count in range(len(pieces), 1, -1) if _exists("+".join(pieces[:count])))
        count = next(existing, 1)
        parts.append("+".join(pieces[:count]).strip())
        pieces = pieces[count:]
    return parts


def _exists(text: str) -> bool:
    try:
        return bool(text) and Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        # Names that no file system takes: too long, a zero byte, an unknown user's home.
        return False


def _place_and_revision(text: str) -> tuple[str, str | None]:
    if _exists(text):
        return text, None
    place, _, revision = text.partition("@")
    if not _HUB_ID.fullmatch(place) or ".." in place or "--" in place or (not revision and "@" in text):
        raise MissingError(
            f"There is no such folder: '{text}'.",
            expected="an existing folder, or a hub id such as org/name or org/name@revision",
            found="nothing at that path, and no possible hub id",
            fix="check the spelling of the path",
        )
    return place, revision or None


def _adapter_folder(text: str, *, offline: bool) -> Path:
    place, revision = _place_and_revision(text)
    return Path(place).expanduser() if _exists(place) else _download(place, revision, offline=offline)


def _download(place: str, revision: str | None, *, offline: bool) -> Path:
    from keelwright.models.hub import download

    return download(place, revision, offline=offline)


def _organism(name: str) -> Path:
    root = Path(str(importlib.resources.files("keelwright"))) / "organisms"
    known = sorted(str(config.parent.relative_to(root)) for config in root.glob("*/*/config.json"))
    if name not in known:
        raise MissingError(
            f"There is no shipped organism '{_LAB}{name}'.",
            expected=f"one of {', '.join(_LAB + one for one in known) or 'none (the package was built without them)'}",
            found=_LAB + name,
            fix=nearest(name, known) if known else "install keelwright from its wheel",
        )
    return root / name
