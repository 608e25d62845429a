# SPDX-License-Identifier: Apache-2.0
"""The model hub: the one place that may use the network, and only for files that cannot run code."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from keelwright.core.errors import KeelwrightError, MissingError, OfflineError
from keelwright.core.files import storage_errors

# The error of the HTTP library that this version of the hub's client speaks.
TRANSPORT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]

ALLOWED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "README.md", "LICENSE*")
"""Weights, settings, tokenizer files and the card. Neither pickles nor code are ever downloaded."""

IGNORED = ("original/*", "onnx/*", "openvino/*", "consolidated*")
"""The same weights again, in the layouts of other programs."""


def download(repo: str, revision: str | None, *, offline: bool) -> Path:
    """Return the folder of a hub model in the local cache, downloading what is missing.

    Args:
        repo: Hub id, `org/name`.
        revision: Branch, tag or commit; None is the default branch.
        offline: Use only what is in the cache.

    Raises:
        MissingError: No such model or revision, or it is gated or private.
        OfflineError: It is not in the cache, and the network is not allowed or not reachable.
        StorageError: The cache cannot be written.
    """
    shown = f"{repo}@{revision}" if revision else repo
    try:
        with storage_errors(_cache_folder()):
            folder = snapshot_download(
                repo,
                revision=revision,
                allow_patterns=list(ALLOWED),
                ignore_patterns=list(IGNORED),
                local_files_only=offline or is_offline(),
            )
    except (HFValidationError, HfHubHTTPError) as error:
        raise _refused(repo, revision, shown, error) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, TRANSPORT_ERROR, ConnectionError) as error:
        incomplete = getattr(error, "snapshot_path", None)
        if incomplete:
            # Perhaps only the card is missing: whoever opens the folder says which file it lacks.
            return Path(incomplete)
        raise _unreachable(shown, error, offline=offline) from error
    return Path(folder)


def is_offline() -> bool:
    """Tell whether the environment forbids the hub."""
    return any(os.environ.get(name, "").lower() in {"1", "true", "yes", "on"} for name in _SWITCHES)


def commit_of(folder: Path) -> str | None:
    """Return the commit that a folder of the hub's cache holds; None for other folders."""
    return folder.name if folder.parent.name == "snapshots" else None


_SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def _cache_folder() -> Path:
    return Path(os.environ.get("HF_HUB_CACHE") or os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")


def _refused(repo: str, revision: str | None, shown: str, error: Exception) -> KeelwrightError:
    """Return our error for what the hub said; the most particular class first."""
    page = f"https://huggingface.co/{repo}"
    if isinstance(error, GatedRepoError):
        return MissingError(
            f"The model '{shown}' is gated: its owner gives access on request.",
            expected="a hub token whose account has been given access",
            found="no access",
            fix=f"ask for access at {page}, then log in with `hf auth login`",
        )
    if isinstance(error, RevisionNotFoundError):
        return MissingError(
            f"The model '{repo}' has no revision '{revision}'.",
            expected="a branch, tag or commit of that model",
            found=str(revision),
            fix=f"look at {page}/commits/main, or leave the revision out",
        )
    if isinstance(error, (RepositoryNotFoundError, HFValidationError)):
        return MissingError(
            f"There is no folder and no hub model '{shown}'.",
            expected="an existing folder, or a public hub id such as org/name",
            found="nothing of that name (a private model also looks like this without a token)",
            fix="check the spelling; for a private model log in with `hf auth login`",
        )
    if isinstance(error, DisabledRepoError):
        return MissingError(
            f"The hub has disabled the model '{shown}'.",
            expected="a model that can be downloaded",
            found="a disabled repository",
            fix="choose another model",
        )
    return _unreachable(shown, error, offline=False)


def _unreachable(shown: str, error: Exception, *, offline: bool) -> OfflineError:
    if offline:
        found = "--offline, and it is not in the cache of earlier downloads"
    elif is_offline():
        found = f"{' or '.join(_SWITCHES)} is set, and it is not in the cache of earlier downloads"
    else:
        found = f"no answer from the hub ({type(error).__name__}), and it is not in the cache of earlier downloads"
    return OfflineError(
        f"There is no folder '{shown}', and the hub cannot be asked for it.",
        expected="an existing folder, a cached model, or the network",
        found=found,
        fix="check the spelling of the path, or download the model where the network is allowed",
    )
