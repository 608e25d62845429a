# SPDX-License-Identifier: Apache-2.0
"""Which settings each merging method has: names, defaults, ranges, numbers of models. One table for both formats.

A setting has the name that mergekit's files give it and the field of our config that it becomes. Reading a mergekit
file keeps that program's semantics: `PARITY` lists the fields in which our own default is another one, with the value
that agrees with it. Our own recipes use the field's name, may use the fields that only we have, and leave what they do
not name to the defaults of the method's config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

from keelwright.core.config import nearest
from keelwright.core.errors import ConfigError
from keelwright.weights.recipes.values import Scalar

Kind = Literal["number", "integer", "flag", "word"]
Base = Literal["required", "optional", "donor"]
"""donor: the method has no base; where a file names one, it gives the config and the tokenizer, and is merged only
where it is listed among the models."""
Alone = Literal["copy", "base", "never"]
"""What becomes of a tensor that only one of the models has: copied, copied where that one is the base, or refused."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One setting of one method."""

    name: str
    """As mergekit's files spell it."""
    field: str
    """The config field that it becomes."""
    kind: Kind = "number"
    default: Scalar | None = None
    required: bool = False
    low: float = float("-inf")
    high: float = float("inf")
    low_open: bool = False
    choices: tuple[str, ...] = ()
    """Of a word."""
    words: tuple[str, str] | None = None
    """Of a flag: the words that false and true become in our config."""


@dataclass(frozen=True, slots=True)
class MethodSettings:
    """The settings of one method."""

    name: str
    per_model: tuple[Parameter, ...] = ()
    shared: tuple[Parameter, ...] = ()
    min_models: int = 1
    """Fewest models besides the base."""
    max_models: int | None = None
    base: Base = "required"
    alone: Alone = "never"
    idle: tuple[str, ...] = ()
    """Parameters that files give it although they change nothing."""
    normalizes: bool = False
    """Whether `normalize` divides task vectors by their weights, which turns a negative weight around."""
    own: tuple[Parameter, ...] = ()
    """Shared fields of our config that mergekit's files cannot name."""
    roles: tuple[str, ...] | None = None
    """Roles of our recipes, where they are not `aligned` and `tuned`."""

    def parameter(self, name: str) -> Parameter | None:
        """Return the parameter of that name, or None."""
        return next((one for one in (*self.per_model, *self.shared) if one.name == name), None)

    def names(self) -> tuple[str, ...]:
        """Return all names."""
        return tuple(one.name for one in (*self.per_model, *self.shared))

    def is_per_model(self, name: str) -> bool:
        """Return whether each model has its own value."""
        return any(one.name == name for one in self.per_model)


_WEIGHT = Parameter("weight", "weight", required=True)
_DENSITY = Parameter("density", "density", default=1.0, low=0.0, high=1.0, low_open=True)
_GAMMA = Parameter("gamma", "gamma", default=0.01, low=0.0, high=1.0)
_DELLA = Parameter("epsilon", "epsilon", default=0.15, low=0.0, high=1.0)
_LAMBDA = Parameter("lambda", "coefficient", default=1.0)
_RESCALE = ("none", "inverse_keep", "l1")
_ELECT = Parameter("elect", "elect", "word", choices=("mass", "count"))
_SEED = Parameter("seed", "seed", "integer", low=0)


def _flag(name: str, default: bool, field: str = "") -> Parameter:
    return Parameter(name, field or name, "flag", default=default)


def _task_vectors(
    name: str,
    *extra: Parameter,
    normalize: bool = False,
    rescale: bool | None = False,
    own: tuple[Parameter, ...] = (),
    density: bool = True,
) -> MethodSettings:
    """Return the settings of a method of the task-vector family: one skeleton, eight names."""
    shared = [_flag("normalize", normalize), _LAMBDA]
    if rescale is not None:
        # True means to that program that the L1 norm of the task vector is restored.
        shared.append(Parameter("rescale", "rescale", "flag", default=rescale, words=("none", "l1")))
    return MethodSettings(
        name,
        per_model=(_WEIGHT, *((_DENSITY,) if density else ()), *extra),
        shared=tuple(shared),
        min_models=0,
        idle=("int8_mask", *(() if density else ("density",)), *(("rescale",) if rescale is None else ())),
        normalizes=True,
        own=own,
    )


def _others(
    name: str,
    *,
    per_model: tuple[Parameter, ...] = (),
    shared: tuple[Parameter, ...] = (),
    models: tuple[int, int | None] = (1, None),
    base: Base = "required",
    alone: Alone = "never",
    own: tuple[Parameter, ...] = (),
) -> MethodSettings:
    known = {one.name for one in (*per_model, *shared)}
    idle = tuple(one for one in ("int8_mask", "normalize", "rescale") if one not in known)
    return MethodSettings(name, per_model, shared, *models, base=base, alone=alone, idle=idle, own=own)


_TIES_OWN = (
    _ELECT,
    Parameter("zero_sign", "zero_sign", "word", choices=("plus", "majority")),
    Parameter("trim_scope", "trim_scope", "word", choices=("tensor", "model")),
)
_UNIQUE = Parameter("epsilon", "epsilon", default=1e-5, low=0.0)
_SCOPE = Parameter("scope", "scope", "word", choices=("tensor", "model"))

METHODS: Final[Mapping[str, MethodSettings]] = {
    one.name: one
    for one in (
        _others(
            "linear",
            per_model=(_WEIGHT,),
            shared=(_flag("normalize", True),),
            base="donor",
            own=(Parameter("coefficient", "coefficient", low=0.0, high=1.0),),
        ),
        _others("slerp", shared=(Parameter("t", "coefficient", required=True),), models=(1, 1), alone="copy"),
        _others(
            "nuslerp",
            per_model=(_WEIGHT,),
            shared=(_flag("nuslerp_flatten", True, "flatten"), _flag("nuslerp_row_wise", False, "row_wise")),
            models=(2, 2),
            base="optional",
            alone="copy",
        ),
        _others(
            "multislerp",
            per_model=(_WEIGHT,),
            shared=(_flag("normalize_weights", True), Parameter("eps", "eps", default=1e-8, low=0.0)),
            base="optional",
        ),
        _others(
            "karcher",
            shared=(
                Parameter("max_iter", "max_iter", "integer", default=10.0, low=1),
                Parameter("tol", "tol", default=1e-5, low=0.0),
            ),
            base="donor",
        ),
        _others(
            "nearswap",
            shared=(Parameter("t", "t", required=True, low=0.0, low_open=True),),
            models=(1, 1),
            alone="base",
        ),
        _others("model_stock", shared=(_flag("filter_wise", False),), models=(2, None), alone="base",
                own=(Parameter("clip", "clip", "flag"),)),
        _task_vectors("task_arithmetic", rescale=None, density=False),
        _task_vectors("ties", normalize=True, own=_TIES_OWN),
        _task_vectors("dare_linear", rescale=True, own=(_SEED,)),
        _task_vectors("dare_ties", rescale=True, own=(_ELECT, _SEED)),
        _task_vectors("breadcrumbs", _GAMMA),
        _task_vectors("breadcrumbs_ties", _GAMMA, own=(_ELECT,)),
        _task_vectors("della", _DELLA, normalize=True, rescale=True, own=(_ELECT, _SEED)),
        _task_vectors("della_linear", _DELLA, rescale=True, own=(_SEED,)),
        _others(
            "sce",
            shared=(Parameter("select_topk", "select_topk", default=1.0, low=0.0, high=1.0),),
            own=(Parameter("legacy", "legacy", "flag"),),
        ),
        _others(
            "arcee_fusion",
            models=(1, 1),
            alone="copy",
            own=(Parameter("coefficient", "coefficient", low=0.0, high=1.0),),
        ),
        _others("ram", shared=(_UNIQUE,)),
        _others(
            "ramplus_tl",
            shared=(
                _UNIQUE,
                Parameter("r", "r", default=0.1, low=0.0),
                Parameter("alpha", "alpha", default=0.2, low=0.0),
            ),
            own=(_SCOPE,),
        ),
        _others("passthrough", per_model=(Parameter("scale", "scale"),), models=(1, 1), base="donor", alone="copy"),
    )
}  # fmt: skip
"""By the name that our catalogue and mergekit's files share."""

PARITY: Final[Mapping[str, Mapping[str, Scalar]]] = {"model_stock": {"clip": False}, "sce": {"legacy": True}}
"""Config fields that a mergekit file cannot name and whose default is ours, with the value that agrees with it."""

_OWN_KARCHER = Parameter("weight", "weight", low=0.0)


def own_settings(method: str) -> MethodSettings:
    """Return the settings of a merging method under the names of our recipes, without defaults.

    Raises:
        ConfigError: The method is not one of the table; the nearest name is offered.
    """
    if method not in METHODS:
        raise unknown_method(method)
    table = METHODS[method]
    per_model = tuple(_own(one) for one in table.per_model)
    if method == "karcher":
        per_model = (_OWN_KARCHER,)
    shared = tuple(_own(one) for one in (*table.shared, *table.own))
    return replace(table, per_model=per_model, shared=shared, own=(), idle=(), min_models=max(1, table.min_models))


def unknown_method(method: str) -> ConfigError:
    """Return the error for a method that we lack."""
    return ConfigError(
        f"There is no merging method '{method}'.",
        expected=f"one of {', '.join(METHODS)}",
        found=method,
        fix=nearest(method, METHODS),
    )


def _own(parameter: Parameter) -> Parameter:
    kind: Kind = "word" if parameter.words else parameter.kind
    choices = _RESCALE if parameter.words else parameter.choices
    return replace(
        parameter, name=parameter.field, kind=kind, choices=choices, words=None, default=None, required=False
    )


def check_value(where: str, parameter: Parameter, value: Scalar) -> Scalar:
    """Return the value as the config wants it.

    Raises:
        ConfigError: It is of the wrong kind, out of range, or not one of the choices.
    """
    if parameter.kind == "flag":
        if not isinstance(value, bool) and value not in (0.0, 1.0):
            raise _wrong(where, parameter, "true or false", value)
        flag = bool(value)
        return parameter.words[flag] if parameter.words else flag
    if parameter.kind == "word":
        if not isinstance(value, str) or value not in parameter.choices:
            fix = nearest(str(value), parameter.choices)
            raise _wrong(where, parameter, f"one of {', '.join(parameter.choices)}", value, fix)
        return value
    if isinstance(value, (bool, str)):
        raise _wrong(where, parameter, "a number", value)
    above = value > parameter.low if parameter.low_open else value >= parameter.low
    if not (above and value <= parameter.high):
        interval = f"{'(' if parameter.low_open else '['}{parameter.low:g}, {parameter.high:g}]"
        raise _wrong(where, parameter, f"a number in {interval}", value)
    if parameter.kind == "integer":
        if value != int(value):
            raise _wrong(where, parameter, "a whole number", value)
        return int(value)
    return float(value)


def _wrong(where: str, parameter: Parameter, expected: str, value: Scalar, fix: str | None = None) -> ConfigError:
    found = f"{value:g}" if isinstance(value, float) else repr(value)
    return ConfigError(
        f"{where}: '{parameter.name}' has the wrong value.",
        expected=expected,
        found=found,
        fix=fix or f"write {expected}",
    )
