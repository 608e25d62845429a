# SPDX-License-Identifier: Apache-2.0
"""Files of data sets on the Hugging Face hub: from the cache of earlier downloads, or downloaded into it."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from keelwright.core.errors import MissingError
from keelwright.core.files import storage_errors
from keelwright.data.sets.spec import Files, SetSpec

# The error of the HTTP library that this version of the hub's client speaks.
_TRANSPORT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]


def fetch(spec: SetSpec, *, offline: bool) -> Files:
    """Return the files of a set that the hub has, by role.

    Args:
        spec: A set with a hub id.
        offline: Take only what is in the cache.

    Raises:
        MissingError: The hub cannot give them; `found` says why.
        StorageError: The cache cannot be written.
    """
    found: dict[str, tuple[Path, ...]] = {}
    for part in spec.files:
        if not part.hub:
            continue
        try:
            found[part.role] = tuple(_file(str(spec.hub), name, offline=offline) for name in part.hub)
        except MissingError:
            if part.required:
                raise
    if not found or any(part.required and part.role not in found for part in spec.files):
        raise _cannot(str(spec.hub), "the hub has only a part of the set, and it is not in the cache")
    return found


def _file(repo: str, name: str, *, offline: bool) -> Path:
    try:
        with storage_errors(Path(constants.HF_HUB_CACHE)):
            return Path(hf_hub_download(repo, name, repo_type="dataset", local_files_only=offline))
    except GatedRepoError as error:
        raise _cannot(repo, "gated: its owner gives access on request") from error
    except RepositoryNotFoundError as error:
        raise _cannot(repo, "no data set of that name that may be read") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        not_asked = "not in the cache of earlier downloads, and no download was asked for"
        raise _cannot(repo, not_asked if offline else "not in the cache, and no network") from error
    except EntryNotFoundError as error:
        raise _cannot(repo, f"no file '{name}' there any more") from error
    except (_TRANSPORT_ERROR, ConnectionError) as error:
        raise _cannot(repo, f"no answer ({type(error).__name__})") from error


def _cannot(repo: str, why: str) -> MissingError:
    return MissingError(
        f"The hub's data set '{repo}' cannot be read.",
        expected="its files",
        found=f"hub data set {repo}: {why}",
        fix="see the set's page on the hub",
    )
