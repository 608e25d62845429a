# SPDX-License-Identifier: Apache-2.0
"""Where a set's files are: a folder that was named, the folder of `KEELWRIGHT_DATA`, or the hub.

A folder may hold the files themselves, as their repository lays them out or flat, or one folder per set. Where a
folder is named, nothing else is looked at: a figure must not come from another copy than the one that was asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from keelwright.core.errors import DataError, MissingError
from keelwright.data.sets.spec import Files, FileSpec, SetSpec

VARIABLE: Final = "KEELWRIGHT_DATA"
"""Environment variable that names the folder of data sets."""


def find_files(spec: SetSpec, *, data: Path | None, offline: bool) -> Files:
    """Return the files of a set by role.

    Args:
        spec: The set.
        data: A file, a folder that holds the files, or a folder with one folder per set; None looks at
            `KEELWRIGHT_DATA` and then at the hub.
        offline: Take from the hub only what an earlier download left in its cache.

    Raises:
        MissingError: The files are nowhere; the text says what was looked for, where, and how to get it.
        DataError: `data` is a file, and the set has several.
    """
    if data is not None:
        if data.is_file():
            return _the_one_file(spec, data)
        found = _in_folder(spec, data)
        if found is None:
            raise _missing(spec, [f"'{data}'{'' if data.is_dir() else ' (there is no such folder)'}"])
        return found
    places = []
    folder = os.environ.get(VARIABLE)
    if folder:
        found = _in_folder(spec, Path(folder))
        if found is not None:
            return found
        places.append(f"'{folder}' ({VARIABLE})")
    else:
        places.append(f"{VARIABLE} is not set")
    if spec.hub:
        from keelwright.data.sets.hub import fetch

        try:
            return fetch(spec, offline=offline)
        except MissingError as error:
            places.append(str(error.found))
    raise _missing(spec, places)


def _the_one_file(spec: SetSpec, path: Path) -> Files:
    """Return a file that was named: by its name, or because the set needs no other."""
    needed = [part for part in spec.files if part.required]
    role = next((part.role for part in spec.files if path.name in part.names), None)
    if len(needed) == 1:
        return {role or needed[0].role: (path,)}
    found = _directly_in(spec, path.parent)
    if found is None or (path,) not in found.values():
        raise DataError(
            f"'{path}' alone is not the data set '{spec.name}'.",
            expected=f"a folder with {_names(spec)}",
            found="one file",
            fix="name the folder that holds all of them",
        )
    return found


def _in_folder(spec: SetSpec, folder: Path) -> Files | None:
    for one in _folders(spec, folder):
        found = _directly_in(spec, one)
        if found is not None:
            return found
    return None


def _folders(spec: SetSpec, folder: Path) -> Iterator[Path]:
    """The set's own folder comes first: a folder of sets may hold a file of the same name for another set."""
    for name in dict.fromkeys((spec.folder or spec.name, spec.name)):
        if (folder / name).is_dir():
            yield folder / name
    if folder.is_dir():
        yield folder


def _directly_in(spec: SetSpec, folder: Path) -> Files | None:
    found: dict[str, tuple[Path, ...]] = {}
    for part in spec.files:
        paths = _paths_of(part, folder)
        if paths:
            found[part.role] = paths
        elif part.required:
            return None
    return found or None


def _paths_of(part: FileSpec, folder: Path) -> tuple[Path, ...]:
    for name in part.names:
        if (folder / name).is_file():
            return (folder / name,)
    paths = tuple(folder / name for name in part.hub)
    return paths if all(path.is_file() for path in paths) else ()


def _names(spec: SetSpec) -> str:
    parts = [part for part in spec.files if part.required] or spec.files
    joint = " and " if any(part.required for part in spec.files) else ", "
    return joint.join(" or ".join(part.names) for part in parts)


def _missing(spec: SetSpec, places: list[str]) -> MissingError:
    hub = f"fetch it with --data hub or `hf download {spec.hub} --repo-type dataset`, or " if spec.hub else ""
    return MissingError(
        f"The data set '{spec.name}' ({spec.title}) was not found.",
        expected=_names(spec),
        found=f"none of them; looked in: {'; '.join(places)}",
        fix=f"{hub}get the files from {spec.upstream}, and name their folder (or set {VARIABLE})",
    )
