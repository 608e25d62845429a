# SPDX-License-Identifier: Apache-2.0
"""Our own recipes: flat YAML with a version, a method, its models by role, and the fields of its config.

keelwright: 1
method: ties
aligned: models/base
tuned: [models/one, models/two]
density: [0.2, 0.4]              # over depth, first layer to last
weight:                          # first filter that fits wins
  - self_attn: 0.3
  - "*": 0.6
weight.tuned_2: 0.5              # of the second tuned model alone
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

from keelwright.core.catalogue import catalogue, find_method
from keelwright.core.config import nearest
from keelwright.core.errors import ConfigError
from keelwright.weights.recipes.fields import as_count, as_dtype, as_text
from keelwright.weights.recipes.mergekit import read_reference
from keelwright.weights.recipes.recipe import Module, Recipe, Slice, Source
from keelwright.weights.recipes.settings import METHODS, Kind, MethodSettings, Parameter, own_settings
from keelwright.weights.recipes.values import Setting, read_flat_setting

VERSION: Final = 1
ROLES: Final = ("aligned", "tuned", "unaligned", "base", "reference")
_PLAIN: Final = ("keelwright", "method", "out_dtype", "tokenizer_source", "pad_to_multiple_of", "seed", "scope")


def read_own(
    document: Mapping[str, Any], where: str, *, settings_of: Callable[[str], MethodSettings] | None = None
) -> Recipe:
    """Return the recipe that one of our own files stands for.

    Args:
        document: The file's one document.
        where: The file, for error texts.
        settings_of: Finds the settings of a method; by default in the table of merging methods, and for every other
            repair in the catalogue.

    Raises:
        ConfigError: The version is not ours, a key is unknown, or a role or a value is missing or wrong.
    """
    version = document.get("keelwright")
    if version != VERSION or isinstance(version, bool):
        raise ConfigError(
            f"{where}: this version of recipes is not known.",
            expected=f"keelwright: {VERSION}",
            found=f"keelwright: {version!r}",
            fix=f"write 'keelwright: {VERSION}', or update keelwright",
        )
    method = as_text(f"{where}: method", document.get("method")).replace("-", "_")
    table = (settings_of or settings_of_method)(method)
    models = _read_roles(where, document, table)
    _refuse_mergekit_names(where, document, table)
    sources, top = _read_fields(where, document, table, models)
    base = "aligned" if table.base != "donor" and "aligned" in models else None
    one_slice = Slice(tuple(Source(key, None, sources.get(key, {})) for key in models), base)
    pad, dtype, seed = (document.get(key) for key in ("pad_to_multiple_of", "out_dtype", "seed"))
    return Recipe(
        "own",
        where,
        method,
        table,
        models,
        base,
        (Module(None, (one_slice,)),),
        top,
        out_dtype=None if dtype is None else as_dtype(f"{where}: out_dtype", dtype),
        tokenizer_source=_read_tokenizer(where, document, models),
        pad_to_multiple_of=None if pad is None else as_count(f"{where}: pad_to_multiple_of", pad, low=1),
        seed=0 if seed is None else as_count(f"{where}: seed", seed, low=0),
        scope=None
        if "scope" in top or document.get("scope") is None
        else as_text(f"{where}: scope", document["scope"]),
    )


def settings_of_method(method: str) -> MethodSettings:
    """Return a method's settings: from the table of merging methods, or from the config of its class.

    Raises:
        ConfigError: There is no such repair.
    """
    if method in METHODS:
        return own_settings(method)
    known = {name for name, line in catalogue().items() if line.room == "repair"} | set(METHODS)
    if method not in known:
        raise ConfigError(
            f"There is no repair method '{method}'.",
            expected=f"one of {', '.join(sorted(known))}",
            found=method,
            fix=nearest(method, known),
        )
    line = find_method(method, room="repair")
    edit = line.load()
    table = settings_from_config(line.name, edit.config_class, line.needs)
    return replace(table, min_models=getattr(edit, "min_models", 1), max_models=getattr(edit, "max_models", 1))


def settings_from_config(name: str, config: type, needs: tuple[str, ...]) -> MethodSettings:
    """Return the settings of a method that every model shares, read off its config.

    Args:
        name: The method.
        config: Its config, a dataclass of plain fields; fields of other types cannot be set by a recipe.
        needs: Roles of the models that it reads.
    """
    hints = typing.get_type_hints(config)
    found = [_parameter_from(field.name, hints[field.name]) for field in dataclasses.fields(config)]
    roles = tuple(role for role in needs if role in ROLES)
    return MethodSettings(
        name, shared=tuple(one for one in found if one is not None), base="donor", max_models=1, roles=roles
    )


def _parameter_from(name: str, hint: Any) -> Parameter | None:
    if typing.get_origin(hint) is typing.Literal:
        return Parameter(name, name, "word", choices=tuple(str(one) for one in typing.get_args(hint)))
    kinds: dict[Any, Kind] = {float: "number", int: "integer", bool: "flag"}
    candidates = typing.get_args(hint) or (hint,)
    return next((Parameter(name, name, kinds[one]) for one in candidates if one in kinds), None)


def _read_roles(where: str, document: Mapping[str, Any], table: MethodSettings) -> dict[str, str]:
    """Return the models by key, in the order of the method's roles."""
    needed, allowed = _roles_of(document, table)
    missing = [role for role in needed if document.get(role) is None]
    if missing:
        raise ConfigError(
            f"{where}: '{table.name}' needs the model '{missing[0]}'.",
            expected=", ".join(needed),
            found=", ".join(role for role in ROLES if document.get(role) is not None) or "no model",
            fix=f"add '{missing[0]}: MODEL'",
        )
    for role in ROLES:
        if document.get(role) is not None and role not in allowed:
            raise ConfigError(
                f"{where}: '{table.name}' does not read a model '{role}'.",
                expected=", ".join(allowed),
                found=role,
                fix="the model that task vectors start from is called 'aligned'"
                if role == "base" and "aligned" in allowed
                else f"remove '{role}', or choose another method",
            )
    models: dict[str, str] = {}
    for role in allowed:
        given = document.get(role)
        if given is None:
            continue
        several = given if role == "tuned" and isinstance(given, list) else [given]
        for number, one in enumerate(several, 1):
            key = role if number == 1 else f"{role}_{number}"
            models[key] = read_reference(f"{where}: {role}", one)
    tuned = [key for key in models if key == "tuned" or key.startswith("tuned_")]
    most = table.max_models
    if len(tuned) < table.min_models or (most is not None and len(tuned) > most):
        wanted = f"exactly {most}" if table.min_models == most else f"{table.min_models} or more"
        raise ConfigError(
            f"{where}: '{table.name}' does not take so many models.",
            expected=f"{wanted} under 'tuned'",
            found=str(len(tuned)),
            fix="list as many, or choose another method",
        )
    return models


def _roles_of(document: Mapping[str, Any], table: MethodSettings) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the roles that a method needs, and those that it may have."""
    if table.roles is not None:
        return table.roles, table.roles
    if table.name == "linear":
        # Two ways to say it: a coefficient between two roles, or weights of any number of tuned models.
        weighted = any(str(key).partition(".")[0] == "weight" for key in document)
        return (("tuned",), ("tuned",)) if weighted else (("aligned", "tuned"), ("aligned", "tuned"))
    if table.base == "required":
        return ("aligned", "tuned"), ("aligned", "tuned")
    return ("tuned",), ("aligned", "tuned") if table.base == "optional" else ("tuned",)


def _refuse_mergekit_names(where: str, document: Mapping[str, Any], table: MethodSettings) -> None:
    """Name the field where someone writes mergekit's word for it, which no spelling check would find."""
    known = {one.name for one in (*table.per_model, *table.shared)}
    foreign = METHODS[table.name] if table.name in METHODS else MethodSettings(table.name)
    for one in (*foreign.per_model, *foreign.shared):
        if one.name in document and one.name not in known:
            raise ConfigError(
                f"{where}: unknown key '{one.name}'.",
                expected=f"fields of '{table.name}': {', '.join(sorted(known)) or 'none'}",
                found=one.name,
                fix=f"in our recipes '{one.name}' is called '{one.field}'",
            )


def _read_fields(
    where: str, document: Mapping[str, Any], table: MethodSettings, models: Mapping[str, str]
) -> tuple[dict[str, dict[str, Setting]], dict[str, Setting]]:
    sources: dict[str, dict[str, Setting]] = {}
    top: dict[str, Setting] = {}
    names = table.names()
    tuned = [key for key in models if key.startswith("tuned")]
    apiece = [f"{one.name}.{key}" for one in table.per_model for key in tuned]
    for raw_key, value in document.items():
        key = str(raw_key)
        if key in ROLES or (key in _PLAIN and not _is_field(key, value, table)):
            continue
        if key in names:
            top[key] = read_flat_setting(f"{where}: {key}", value)
        elif key in apiece:
            name, _, model = key.partition(".")
            sources.setdefault(model, {})[name] = read_flat_setting(f"{where}: {key}", value)
        else:
            known = (*_PLAIN, *ROLES, *names, *apiece)
            raise ConfigError(
                f"{where}: unknown key '{key}'.",
                expected=f"fields of '{table.name}': {', '.join((*names, *apiece)) or 'none'}",
                found=key,
                fix=nearest(key, known),
            )
    if table.name == "linear" and "coefficient" in top and ("weight" in top or sources):
        raise ConfigError(
            f"{where}: 'linear' is given both a coefficient and weights.",
            expected="'coefficient' between 'aligned' and 'tuned', or 'weight' of the tuned models",
            found="both",
            fix="keep one",
        )
    return sources, top


def _is_field(key: str, value: object, table: MethodSettings) -> bool:
    """Return whether a key that every recipe has is a field of this method as well."""
    parameter = table.parameter(key)
    # A part of the model and the extent of a method's counts are both called its scope; their values differ.
    return parameter is not None and (key != "scope" or value in parameter.choices)


def _read_tokenizer(where: str, document: Mapping[str, Any], models: Mapping[str, str]) -> str | None:
    raw = document.get("tokenizer_source")
    if raw is None:
        return None
    name = as_text(f"{where}: tokenizer_source", raw)
    known = ("union", *models)
    if name not in known:
        raise ConfigError(
            f"{where}: 'tokenizer_source' names no model of the recipe.",
            expected=f"one of {', '.join(known)}",
            found=name,
            fix=nearest(name, known),
        )
    return name
