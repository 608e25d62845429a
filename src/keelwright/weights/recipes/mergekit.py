# SPDX-License-Identifier: Apache-2.0
"""mergekit's YAML, read as that program reads it; what we lack, or what it would silently ignore, is refused by name.

Semantics of mergekit 0.1.5 are kept where ours differ by default: `rescale: true` is the L1 form, `model_stock` does
not clip its ratio, `sce` falls back to equal weights below its absolute threshold. The plan prints each of them. What
cannot be kept: that program computes most methods in the recipe's `dtype`, ours always in float32 with one rounding;
and its random masks come from a global generator, so that only their statistics agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from keelwright.core.config import nearest
from keelwright.core.errors import ConfigError
from keelwright.weights.recipes.fields import as_count, as_dtype, as_list, as_mapping, as_text, require_known
from keelwright.weights.recipes.recipe import Level, Module, Recipe, Slice, Source
from keelwright.weights.recipes.settings import METHODS, PARITY, MethodSettings, unknown_method
from keelwright.weights.recipes.values import Setting, read_setting

_TOP: Final = (
    "merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype",
    "tokenizer_source", "tokenizer",
)  # fmt: skip
_FORMS: Final = ("models", "slices", "modules")
_RAW_FILES: Final = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")

_MIXTURE: Final = ("a mixture-of-experts recipe", "merge dense models, or build the mixture with its own program")
_REFUSED: Final = {
    "experts": _MIXTURE,
    "gate_mode": _MIXTURE,
    "genome": ("an evolutionary search", "use 'repair METHOD --coefficient auto', which searches on safety items"),
    "residual_weight": ("a setting that the original program reads and does not use", "remove the line"),
    "chat_template": (
        "a chat template of its own",
        "remove the line; the template of the base, or else of the first model, is copied",
    ),
    "override_architecture": (
        "one architecture read as another",
        "remove the line and merge models of one architecture",
    ),
    "tokens": (
        "sources of single tokens",
        "remove it; a missing row is the base's, its only owner's, or the mean of its owners",
    ),
}
"""Keys that mean something we do not do: what it is, and what to do instead."""


@dataclass(slots=True)
class _Reading:
    """What is gathered while a file is read."""

    where: str
    table: MethodSettings
    models: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    rescales: bool = False

    def warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)

    def model(self, where: str, raw: object) -> str:
        """Return the key of a model, which is its reference."""
        text = read_reference(where, raw)
        self.models[text] = text
        return text


def read_mergekit(document: Mapping[str, Any], where: str) -> Recipe:
    """Return the recipe that a mergekit file stands for.

    Args:
        document: The file's one document.
        where: The file, for error texts.

    Raises:
        ConfigError: A key, a parameter or a value is unknown, missing or one that we do not do.
    """
    _refuse_by_name(where, document)
    require_known(where, document, _TOP)
    method = as_text(f"{where}: merge_method", document.get("merge_method"))
    if method not in METHODS:
        raise unknown_method(method)
    reading = _Reading(where, METHODS[method])
    forms = [key for key in _FORMS if document.get(key) is not None]
    if len(forms) != 1:
        raise ConfigError(
            f"{where}: the models must be given in exactly one way.",
            expected="one of 'models', 'slices' and 'modules'",
            found=", ".join(forms) or "none of them",
            fix="keep one" if forms else "list the models under 'models'",
        )
    top_base = document.get("base_model")
    base = None if top_base is None else read_reference(f"{where}: base_model", top_base)
    modules = _read_modules(reading, document, base)
    if base is not None:
        reading.models.setdefault(base, base)
    settings = _read_parameters(reading, f"{where}: parameters", document.get("parameters"))
    _require_given(reading, modules, settings)
    tokenizer, pad = _read_tokenizer(reading, document, base)
    return Recipe(
        "mergekit",
        where,
        method,
        reading.table,
        reading.models,
        base,
        modules,
        settings,
        out_dtype=_read_dtype(where, document),
        tokenizer_source=tokenizer,
        pad_to_multiple_of=pad,
        warnings=tuple(reading.warnings),
        notes=_notes(reading, document),
    )


def read_reference(where: str, raw: object) -> str:
    """Return a model's reference as text: `path[@revision][+adapter[@revision]]`.

    Args:
        where: Its place in the file, for error texts.
        raw: Text, or the mapping `{model: {path, revision}, lora: ...}`.
    """
    if not isinstance(raw, Mapping):
        text = as_text(where, raw)
        if text.partition("+")[0].endswith(_RAW_FILES):
            raise ConfigError(
                f"{where}: this names a file of raw tensors.",
                expected="a model: a folder, or a hub id such as org/name or org/name@revision",
                found=text,
                fix="pass the folder of a whole checkpoint; merging bare tensor files is not done",
            )
        return text
    _refuse_by_name(where, raw)
    if "path" in raw:
        require_known(where, raw, ("path", "revision"))
        text = read_reference(f"{where}.path", raw["path"])
        revision = raw.get("revision")
        return text if revision is None else f"{text}@{as_text(f'{where}.revision', revision)}"
    require_known(where, raw, ("model", "lora"))
    text = read_reference(f"{where}.model", raw.get("model"))
    return text if raw.get("lora") is None else f"{text}+{read_reference(f'{where}.lora', raw['lora'])}"


def _refuse_by_name(where: str, raw: Mapping[str, Any]) -> None:
    for key in raw:
        if key in _REFUSED:
            what, fix = _REFUSED[key]
            raise ConfigError(
                f"{where}: '{key}' is not done here.", expected="a merge of whole models", found=what, fix=fix
            )


def _read_modules(reading: _Reading, document: Mapping[str, Any], base: str | None) -> tuple[Module, ...]:
    where = reading.where
    if document.get("modules") is None:
        return (Module(None, _read_slices(reading, where, document, base)),)
    modules = as_mapping(f"{where}: modules", document["modules"])
    found = []
    for name, raw in modules.items():
        place = f"{where}: modules.{name}"
        body = as_mapping(place, raw)
        _refuse_by_name(place, body)
        require_known(place, body, ("models", "slices", "parameters"))
        if (body.get("models") is None) == (body.get("slices") is None):
            raise ConfigError(
                f"{place}: the models must be given in exactly one way.",
                expected="one of 'models' and 'slices'",
                found="both" if body.get("models") is not None else "none of them",
                fix="keep one" if body.get("models") is not None else "list the models under 'models'",
            )
        settings = _read_parameters(reading, f"{place}.parameters", body.get("parameters"))
        found.append(Module(str(name), _read_slices(reading, place, body, base), settings))
    if not found:
        raise ConfigError(
            f"{where}: 'modules' is empty.",
            expected="the parts of the model by name",
            found="nothing",
            fix="name the parts, or list the models under 'models'",
        )
    return tuple(found)


def _read_slices(reading: _Reading, where: str, body: Mapping[str, Any], base: str | None) -> tuple[Slice, ...]:
    if body.get("models") is not None:
        return (_read_models(reading, where, body["models"], base),)
    listed = as_list(f"{where}: slices", body["slices"])
    return tuple(_read_slice(reading, f"{where}: slices[{index}]", one, base) for index, one in enumerate(listed))


def _read_models(reading: _Reading, where: str, raw: object, base: str | None) -> Slice:
    sources = []
    for index, one in enumerate(as_list(f"{where}: models", raw)):
        place = f"{where}: models[{index}]"
        entry = as_mapping(place, one)
        _refuse_by_name(place, entry)
        require_known(place, entry, ("model", "parameters"))
        sources.append(_read_source(reading, place, entry, None, base))
    listed = [source.model for source in sources]
    if base is not None and base not in listed:
        if reading.table.base == "donor":
            raise ConfigError(
                f"{where}: 'base_model' is not among the models, and '{reading.table.name}' has no base.",
                expected=f"'{base}' listed under 'models', or no 'base_model'",
                found=f"models {', '.join(listed)}",
                fix="remove 'base_model', or list it as a model; otherwise it would be merged in unasked",
            )
        reading.models.setdefault(base, base)
        sources.append(Source(base))
    return _checked(reading, where, Slice(tuple(sources), _base_of(reading, base)), base)


def _read_slice(reading: _Reading, where: str, raw: object, top_base: str | None) -> Slice:
    body = as_mapping(where, raw)
    _refuse_by_name(where, body)
    require_known(where, body, ("sources", "base_model", "parameters"))
    own = body.get("base_model")
    base = top_base if own is None else reading.model(f"{where}.base_model", own)
    sources = []
    for index, one in enumerate(as_list(f"{where}.sources", body.get("sources"))):
        place = f"{where}.sources[{index}]"
        entry = as_mapping(place, one)
        _refuse_by_name(place, entry)
        require_known(place, entry, ("model", "layer_range", "parameters"))
        layers = _read_range(f"{place}.layer_range", entry.get("layer_range"))
        sources.append(_read_source(reading, place, entry, layers, base))
    lengths = {source.layers[1] - source.layers[0] for source in sources if source.layers is not None}
    if len(lengths) > 1:
        spelt = ", ".join(
            f"{source.model} [{source.layers[0]}, {source.layers[1]}]" for source in sources if source.layers
        )
        raise ConfigError(
            f"{where}: the sources are not equally long.",
            expected="layer ranges of one length, each [first, one after the last]",
            found=spelt,
            fix="make the ranges equally long",
        )
    settings = _read_parameters(reading, f"{where}.parameters", body.get("parameters"))
    return _checked(reading, where, Slice(tuple(sources), _base_of(reading, base), settings), base)


def _base_of(reading: _Reading, base: str | None) -> str | None:
    return None if reading.table.base == "donor" else base


def _read_source(
    reading: _Reading, where: str, entry: Mapping[str, Any], layers: tuple[int, int] | None, base: str | None
) -> Source:
    model = reading.model(f"{where}.model", entry.get("model"))
    is_base = model == base and reading.table.base != "donor"
    settings = _read_parameters(reading, f"{where}.parameters", entry.get("parameters"), source=True, is_base=is_base)
    return Source(model, layers, settings)


def _read_range(where: str, raw: object) -> tuple[int, int]:
    whole = isinstance(raw, list) and len(raw) == 2 and all(type(one) is int for one in raw)
    if not whole or not 0 <= raw[0] < raw[1]:  # type: ignore[index]
        raise ConfigError(
            f"{where}: not a range of layers.",
            expected="[first, one after the last], counted from 0, with at least one layer",
            found="nothing" if raw is None else repr(raw),
            fix="write for example [0, 16]",
        )
    return raw[0], raw[1]  # type: ignore[index]


def _checked(reading: _Reading, where: str, one: Slice, named_base: str | None) -> Slice:
    """Return the slice, or raise where the method cannot work on its models."""
    table, keys = reading.table, [source.model for source in one.sources]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise ConfigError(
            f"{where}: the model '{twice}' stands twice in one group.",
            expected="each model once",
            found=", ".join(keys),
            fix="remove one, or give it another weight",
        )
    if table.base == "required" and named_base is None:
        raise ConfigError(
            f"{where}: '{table.name}' needs a base model.",
            expected="'base_model: NAME'",
            found="no 'base_model'",
            fix="name the model that the others were tuned from",
        )
    if one.base is not None and one.base not in keys:
        raise ConfigError(
            f"{where}: the base model is not among the sources.",
            expected=f"'{one.base}' as a source, with its layer range",
            found=", ".join(keys),
            fix="list the base as a source of the slice"
            + ("" if table.base == "required" else ", or remove 'base_model'"),
        )
    count = len([key for key in keys if key != one.base])
    if count < table.min_models or (table.max_models is not None and count > table.max_models):
        besides = " besides the base" if one.base is not None else ""
        wanted = (
            f"exactly {table.min_models}" if table.min_models == table.max_models else f"{table.min_models} or more"
        )
        raise ConfigError(
            f"{where}: '{table.name}' does not take so many models.",
            expected=f"{wanted}{besides}",
            found=f"{count}: {', '.join(key for key in keys if key != one.base) or 'none'}",
            fix="list as many, or choose another method",
        )
    return one


def _read_parameters(
    reading: _Reading, where: str, raw: object, *, source: bool = False, is_base: bool = False
) -> Level:
    table, found = reading.table, dict[str, Setting]()
    for name, value in as_mapping(where, raw).items():
        if name in table.idle:
            reading.warn(f"{where}: '{name}' changes nothing for '{table.name}'; it is ignored.")
        elif name in _REFUSED:
            _refuse_by_name(where, {name: value})
        elif table.parameter(str(name)) is None:
            known = table.names()
            raise ConfigError(
                f"{where}: '{table.name}' has no parameter '{name}'.",
                expected=f"parameters out of {', '.join(known)}" if known else "no parameters",
                found=str(name),
                fix=nearest(str(name), known) if known else f"remove '{name}'",
            )
        elif source and not table.is_per_model(name):
            reading.warn(
                f"{where}: '{name}' belongs to the whole merge and is not read at a single model; it is ignored. "
                "Move it to the 'parameters' of the recipe or of the slice."
            )
        elif is_base:
            reading.warn(f"{where}: '{name}' changes nothing at the base model; it is ignored.")
        else:
            found[name] = read_setting(f"{where}.{name}", value)
            reading.rescales |= name == "rescale"
    return found


def _require_given(reading: _Reading, modules: tuple[Module, ...], top: Level) -> None:
    """Raise where a required parameter is named nowhere, before any model is opened."""
    for module in modules:
        for one in module.slices:
            for source in one.sources:
                if source.model == one.base:
                    continue
                for parameter in (*reading.table.per_model, *reading.table.shared):
                    levels = (source.settings, one.settings, module.settings, top)
                    if parameter.required and not any(parameter.name in level for level in levels):
                        raise missing_parameter(reading.where, reading.table, parameter.name, source.model)


def missing_parameter(
    where: str, table: MethodSettings, name: str, model: str, tensor: str | None = None
) -> ConfigError:
    """Return the error for a required parameter that no level gives."""
    per_model = table.is_per_model(name)
    return ConfigError(
        f"{where}: '{table.name}' needs the parameter '{name}'.",
        expected=f"'{name}' for every model, in its own parameters or at the top"
        if per_model
        else f"'{name}' in the parameters of the recipe or of the slice",
        found=(f"no rule for '{tensor}'" if tensor else "nothing") + (f" of '{model}'" if per_model else ""),
        fix=f"add '{name}'" + (", for example a last rule without a filter" if tensor else ""),
    )


def _read_dtype(where: str, document: Mapping[str, Any]) -> str | None:
    dtype = document.get("dtype")
    checked = None if dtype is None else as_dtype(f"{where}: dtype", dtype)
    out = document.get("out_dtype")
    return checked if out is None else as_dtype(f"{where}: out_dtype", out)


def _read_tokenizer(reading: _Reading, document: Mapping[str, Any], base: str | None) -> tuple[str | None, int | None]:
    where, flat, nested = reading.where, document.get("tokenizer_source"), document.get("tokenizer")
    if flat is not None and nested is not None:
        raise ConfigError(
            f"{where}: the tokenizer is given twice.",
            expected="'tokenizer_source' or 'tokenizer'",
            found="both",
            fix="keep 'tokenizer'",
        )
    if flat is None and nested is None:
        return None, None
    source, pad, place = flat, None, f"{where}: tokenizer_source"
    if nested is not None:
        body = as_mapping(f"{where}: tokenizer", nested)
        _refuse_by_name(f"{where}: tokenizer", body)
        require_known(f"{where}: tokenizer", body, ("source", "pad_to_multiple_of"))
        source, place = body.get("source", "union"), f"{where}: tokenizer.source"
        given = body.get("pad_to_multiple_of")
        pad = None if given is None else as_count(f"{where}: tokenizer.pad_to_multiple_of", given, low=1)
    name = read_reference(place, source)
    if name == "base" and base is None:
        raise ConfigError(
            f"{place}: there is no base model to take the tokenizer from.",
            expected="'base_model', or 'union', or one of the models",
            found="base",
            fix="name a 'base_model', or write 'union'",
        )
    if "/" in name:
        # A donor of the tokenizer alone; a name without a folder is more likely a slip of the pen.
        reading.models.setdefault(name, name)
    if name not in ("base", "union") and name not in reading.models:
        raise ConfigError(
            f"{place}: '{name}' is not one of the models.",
            expected=f"base, union, or one of {', '.join(reading.models)}",
            found=name,
            fix=nearest(name, ("base", "union", *reading.models)),
        )
    return name, pad


def _notes(reading: _Reading, document: Mapping[str, Any]) -> tuple[str, ...]:
    table = reading.table
    notes = [
        f"{name}: {str(value).lower() if isinstance(value, bool) else value}, as mergekit does it; our default differs"
        for name, value in PARITY.get(table.name, {}).items()
    ]
    rescale = table.parameter("rescale")
    if rescale is not None and (rescale.default is True or reading.rescales):
        notes.append("rescale: true means l1, as mergekit does it; our own recipes rescale by the share kept")
    if document.get("dtype") is not None:
        notes.append("dtype: the dtype of the output; arithmetic is float32 with one rounding, whatever it says")
    return tuple(notes)
