# SPDX-License-Identifier: Apache-2.0
"""How the files of each kind of PEFT adapter are read; kinds that cannot be added are refused with the reason.

Formulas are those of PEFT 0.21's merge, in float32. Convolutions are refused for every kind.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from keelwright.core.errors import ConfigError, DataError
from keelwright.models.adapter_changes import (
    Change,
    Dora,
    Hadamard,
    Kronecker,
    Layout,
    LoraFactors,
    Offset,
)
from keelwright.models.adapter_late import ExpertLayer, Late, LateBias, LateRotation, LateRows, SharedFactors
from keelwright.models.folders import ADAPTER_CONFIG

_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""`init_lora_weights` that leave the base weights alone; the others store a difference from changed ones."""

_REFUSED_SWITCHES = {
    "use_qalora": "its factors act on pooled inputs",
    "layer_replication": "it makes a deeper model: its layers are not those of the base",
    "alora_invocation_tokens": "it is on for a part of each prompt only, so no one set of weights equals it",
    "arrow_config": "it picks adapters for each token, so no one set of weights equals it",
    "kasa_config": "it also changes the base weights",
    "monteclora_config": "it samples its factors",
    "megatron_config": "its factors are split over machines",
}

_REFUSED_KINDS = {
    "XLORA": "it mixes adapters for each input, so no one set of weights equals it",
    "PREFIX_TUNING": "it changes the prompt, not the weights",
    "PROMPT_TUNING": "it changes the prompt, not the weights",
    "P_TUNING": "it changes the prompt, not the weights",
    "MULTITASK_PROMPT_TUNING": "it changes the prompt, not the weights",
    "ADAPTION_PROMPT": "it changes the attention, not the weights",
    "CPT": "it changes the prompt, not the weights",
}

_PREFIX = "base_model.model."
_LORA = re.compile(
    r"(.+)\.lora_(A|B|E|embedding_A|embedding_B|magnitude_vector|velora_embed)(?:\.(?!weight$|bias$)[^.]+)?"
    r"(?:\.(weight|bias))?"
)
_TOKENS = re.compile(r"(.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.[^.]+)?")

Reader = Callable[["_Adapter"], "Contents"]


@dataclass(slots=True)
class Contents:
    """What the files of an adapter come to."""

    factors: dict[str, LoraFactors] = field(default_factory=dict)
    full: dict[str, Tensor] = field(default_factory=dict)
    changes: dict[str, Change] = field(default_factory=dict)
    late: list[Late] = field(default_factory=list)


class _Load(Protocol):
    def __call__(self) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True, slots=True)
class _Adapter:
    """An adapter's settings and tensors as its files give them."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    text: str

    def parts(self, pattern: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """Return the tensors whose keys match, by module and part, and the others by their own names."""
        found: dict[str, dict[str, Tensor]] = {}
        others: dict[str, Tensor] = {}
        for key, tensor in self.tensors.items():
            match = re.fullmatch(pattern, key.removeprefix(_PREFIX))
            if match:
                found.setdefault(match[1], {})[match[2]] = tensor.float()
            else:
                others[plain_name(key)] = tensor
        return found, others

    def pattern(self, kind: str, module: str, default: str) -> Any:
        """Return the setting of a module: of the first pattern that ends its name, as PEFT matches them."""
        for pattern, value in (self.config.get(kind) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return self.config.get(default)


def read_contents(config: Mapping[str, Any], load: _Load, text: str) -> Contents:
    """Return what an adapter does to each tensor.

    Args:
        config: The adapter's settings as `adapter_config.json` spells them.
        load: Returns the adapter's tensors by PEFT's keys; called once the settings are known to be readable.
        text: The user's own words for the adapter.

    Raises:
        ConfigError: The adapter is of a kind that keelwright does not add.
        DataError: The tensors and the settings disagree.
    """
    kind = str(config.get("peft_type"))
    if kind not in _READERS:
        reason = _REFUSED_KINDS.get(kind)
        raise _unsupported(text, f"peft_type {kind}" + (f": {reason}" if reason else ""))
    if kind == "LORA":
        _require_readable_lora(config, text)
    return _READERS[kind](_Adapter(config, load(), text))


def split_key(key: str) -> tuple[str, str | None]:
    """Split a PEFT key of LoRA into the module's name and the part: `A`, `B`, `embedding_A`, `magnitude_vector`, ...

    A key that is no part of a factor gives the tensor's own name and None; the bias of `B` is the part `B_bias`.
    """
    match = _LORA.fullmatch(key.removeprefix(_PREFIX))
    if match:
        return match[1], f"{match[2]}_bias" if match[3] == "bias" else match[2]
    return plain_name(key), None


def plain_name(key: str) -> str:
    """Return the base's name of a tensor that PEFT stores under `key`."""
    name = key.removeprefix(_PREFIX)
    return re.sub(r"\.(?:modules_to_save(?:\.default)?|base_layer|original_module)\.", ".", name)


def _require_readable_lora(config: Mapping[str, Any], text: str) -> None:
    for switch, reason in _REFUSED_SWITCHES.items():
        if config.get(switch):
            raise _unsupported(text, f"LoRA with {switch}: {reason}")
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise _unsupported(
            text,
            f"LoRA started with '{start}', which also changes the base weights",
            fix="save it again from the training run as plain LoRA: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=FOLDER_OF_THE_UNTRAINED_ADAPTER)",
        )


def _unsupported(text: str, found: str, *, fix: str | None = None) -> ConfigError:
    return ConfigError(
        f"The adapter '{text}' is of a kind that keelwright does not add yet.",
        expected="LoRA (plain, rank-stabilised, DoRA), AdaLoRA, VeRA, LoHa, LoKr, IA3, OFT, trained norms or tokens",
        found=found,
        fix=fix or "merge it with PEFT (merge_and_unload), save the full model, and pass that",
    )


def _misfit(adapter: _Adapter, module: str, expected: str, found: str) -> DataError:
    return DataError(
        f"The adapter '{adapter.text}' has factors for '{module}' that do not fit its settings.",
        expected=expected,
        found=found,
        fix=f"restore the {ADAPTER_CONFIG} that the factors were trained with",
    )


def _shapes(parts: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in sorted(parts.items()))


def _require_parts(adapter: _Adapter, module: str, parts: Mapping[str, Tensor], wanted: Iterable[str]) -> None:
    wanted = set(wanted)
    if set(parts) != wanted or any(one.ndim != 2 for name, one in parts.items() if name in wanted):
        raise DataError(
            f"The adapter '{adapter.text}' lacks a part for '{module}', or is one of a convolution.",
            expected=f"matrices {', '.join(sorted(wanted))}",
            found=_shapes(parts),
            fix="save the adapter again; convolutions are not read",
        )


def _read_lora(adapter: _Adapter) -> Contents:
    found = Contents()
    modules: dict[str, dict[str, Tensor]] = {}
    tokens: dict[str, Tensor] = {}
    for key, tensor in adapter.tensors.items():
        module, part = split_key(key)
        token = _TOKENS.fullmatch(key.removeprefix(_PREFIX))
        if token:
            tokens[token[1]] = tensor.float()
        elif part is None:
            if ".lora_" in module:
                raise _unsupported(adapter.text, f"LoRA with the part '{module}'")
            found.full[module] = tensor
        elif part != "velora_embed":
            # VeLoRA's projection compresses gradients; the trained sum is plain.
            modules.setdefault(module, {})[part] = tensor.float()
    experts = _expert_layers(adapter, modules)
    found.late += experts
    taken = {name for layer in experts for name in layer.modules}
    for module, parts in modules.items():
        if module not in taken:
            _add_module(found, adapter, module, parts)
    found.late += [
        LateRows(f"{module}.weight", _token_indices(adapter, module, "trainable_token_indices"), rows)
        for module, rows in tokens.items()
    ]
    return found


def _add_module(found: Contents, adapter: _Adapter, module: str, parts: dict[str, Tensor]) -> None:
    magnitude, bias = parts.pop("magnitude_vector", None), parts.pop("B_bias", None)
    parts = _with_blocks(adapter, module, parts)
    embedding = "embedding_A" in parts
    factors = _pair(adapter, module, parts)
    if bool(adapter.config.get("use_dora")) != (magnitude is not None):
        raise _misfit(
            adapter,
            module,
            "lora_magnitude_vector with use_dora, and none without it",
            f"use_dora {adapter.config.get('use_dora')}, {_shapes(parts)}",
        )
    name = f"{module}.weight"
    if magnitude is None:
        found.factors[name] = factors
    else:
        by_columns = embedding or bool(adapter.config.get("fan_in_fan_out"))
        outputs = factors.shape[1 if by_columns else 0]
        if magnitude.numel() != outputs:
            raise _misfit(adapter, module, f"{outputs} magnitudes", f"{magnitude.numel()}")
        found.changes[name] = Dora(factors, magnitude.flatten(), by_columns)
    if bias is not None:
        found.changes[f"{module}.bias"] = Offset(bias, factors.scale)


def _with_blocks(adapter: _Adapter, module: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the factors of BD-LoRA, which stores the blocks of a block-diagonal factor below each other."""
    settings = adapter.config.get("use_bdlora")
    if not settings:
        return parts
    place, count = module.rpartition(".")[2], settings.get("nblocks", 1)
    for part, key in (("A", "target_modules_bd_a"), ("B", "target_modules_bd_b")):
        if part in parts and any(pattern in place for pattern in settings.get(key) or ()):
            if type(count) is not int or count < 1 or parts[part].shape[0] % count:
                raise _misfit(adapter, module, f"{part} of {count} blocks", _shapes(parts))
            return {**parts, part: torch.block_diag(*parts[part].chunk(count))}
    return parts


def _pair(adapter: _Adapter, module: str, parts: Mapping[str, Tensor]) -> LoraFactors:
    kinds = frozenset(parts)
    if kinds not in ({"A", "B"}, {"embedding_A", "embedding_B"}):
        raise DataError(
            f"The adapter '{adapter.text}' has half a pair for '{module}'.",
            expected="lora_A and lora_B",
            found=" and ".join(f"lora_{part}" for part in sorted(kinds)),
            fix="save the adapter again",
        )
    embedding = "embedding_A" in kinds
    small_a, small_b = (parts["embedding_A"], parts["embedding_B"]) if embedding else (parts["A"], parts["B"])
    rank = adapter.pattern("rank_pattern", module, "r")
    fits = small_a.ndim == 2 and small_b.ndim == 2 and small_a.shape[0] == small_b.shape[1] == rank
    if not fits:
        raise _misfit(
            adapter,
            module,
            f"A [{rank}, columns] and B [rows, {rank}] with a number for lora_alpha",
            f"A {list(small_a.shape)}, B {list(small_b.shape)}",
        )
    scale = _scale(adapter, module, rank)
    turned = embedding or bool(adapter.config.get("fan_in_fan_out"))
    if turned:
        small_a, small_b = small_b.T, small_a.T
    layout: Layout = "embedding" if embedding else "transposed" if turned else "linear"
    return LoraFactors(small_b.contiguous(), small_a.contiguous(), scale, layout)


def _scale(adapter: _Adapter, module: str, rank: int, alpha_name: str = "lora_alpha") -> float:
    alpha = adapter.pattern("alpha_pattern", module, alpha_name)
    if not isinstance(alpha, (int, float)) or not isinstance(rank, int) or rank < 1:
        raise _misfit(adapter, module, f"numbers for {alpha_name} and the rank", f"{alpha} and {rank}")
    return alpha / math.sqrt(rank) if adapter.config.get("use_rslora") else alpha / rank


def _expert_layers(adapter: _Adapter, modules: Mapping[str, Mapping[str, Tensor]]) -> list[ExpertLayer]:
    """Return the wrapped parameters of `target_parameters`: keys nest as `experts.base_layer.lora_A`."""
    targets = list(adapter.config.get("target_parameters") or ())
    layers: dict[str, list[tuple[int, str]]] = {}
    for module in modules:
        bare = re.sub(r"(?:\.base_layer)+$", "", module)
        if any(bare == parent or bare.endswith(f".{parent}") for parent in _parents(targets)):
            layers.setdefault(bare, []).append((module.count(".base_layer"), module))
    found = []
    for bare, nested in layers.items():
        # The innermost wrapper belongs to the parameter that the module registers first.
        order = tuple(module for _, module in sorted(nested, reverse=True))
        pairs = []
        for module in order:
            _require_parts(adapter, module, modules[module], ("A", "B"))
            pairs.append((modules[module]["A"], modules[module]["B"]))

        def scale(name: str) -> tuple[int, float]:
            rank = adapter.pattern("rank_pattern", name, "r")
            return rank, _scale(adapter, name, rank)

        names = [target.rpartition(".")[2] for target in targets if _under(bare, target)]
        wanted = {name: scale(f"{bare}.{name}") for name in names}
        found.append(ExpertLayer(adapter.text, bare, order, tuple(pairs), wanted))
    return found


def _parents(targets: Iterable[str]) -> set[str]:
    return {target.rpartition(".")[0] for target in targets}


def _under(module: str, target: str) -> bool:
    parent = target.rpartition(".")[0]
    return module == parent or module.endswith(f".{parent}")


def _token_indices(adapter: _Adapter, module: str, setting: str) -> tuple[int, ...]:
    given = adapter.config.get(setting)
    if isinstance(given, Mapping):
        given = next((value for name, value in given.items() if module == name or module.endswith(f".{name}")), None)
    if not isinstance(given, list) or not all(type(index) is int and index >= 0 for index in given):
        raise _misfit(adapter, module, f"a list of rows in {setting}", repr(given)[:80])
    return tuple(given)


def _read_tokens(adapter: _Adapter) -> Contents:
    found = Contents()
    for key, tensor in adapter.tensors.items():
        match = _TOKENS.fullmatch(key.removeprefix(_PREFIX))
        if match:
            indices = _token_indices(adapter, match[1], "token_indices")
            found.late.append(LateRows(f"{match[1]}.weight", indices, tensor.float()))
        else:
            found.full[plain_name(key)] = tensor
    return found


def _read_adalora(adapter: _Adapter) -> Contents:
    modules, full = adapter.parts(r"(.+)\.lora_(A|B|E)(?:\.weight)?")
    found = Contents(full=full)
    alpha, first_rank = adapter.config.get("lora_alpha"), adapter.config.get("init_r")
    if not isinstance(alpha, (int, float)) or not isinstance(first_rank, int):
        raise _misfit(adapter, "every module", "numbers for lora_alpha and init_r", f"{alpha} and {first_rank}")
    for module, parts in modules.items():
        _require_parts(adapter, module, parts, ("A", "B", "E"))
        small_a, small_b, values = parts["A"], parts["B"], parts["E"]
        rank = small_a.shape[0]
        if not (rank == small_b.shape[1] == values.shape[0]):
            raise _misfit(adapter, module, "A, B and E of one rank", _shapes(parts))
        # The ranks that were taken away still count in the denominator, which PEFT keeps away from zero.
        scale = (alpha if alpha > 0 else float(rank)) / (first_rank + 1e-5)
        one = LoraFactors(small_b, (small_a * values).contiguous(), scale, "linear")
        found.factors[f"{module}.weight"] = one.transposed() if adapter.config.get("fan_in_fan_out") else one
    return found


def _read_vera(adapter: _Adapter) -> Contents:
    shared = {key[-1]: adapter.tensors[key] for key in adapter.tensors if re.fullmatch(r"base_model\.vera_[AB]", key)}
    if set(shared) != {"A", "B"}:
        raise _unsupported(
            adapter.text,
            "VeRA without its projections",
            fix="save it again with save_projection=True, or merge it with PEFT (merge_and_unload)",
        )
    tensors = {key: one for key, one in adapter.tensors.items() if not re.fullmatch(r"base_model\.vera_[AB]", key)}
    modules, full = _Adapter(adapter.config, tensors, adapter.text).parts(r"(.+)\.vera_lambda_(b|d)")
    found = Contents(full=full)
    projection = (shared["A"].float(), shared["B"].float())
    for module, parts in modules.items():
        if set(parts) != {"b", "d"}:
            raise _misfit(adapter, module, "vera_lambda_b and vera_lambda_d", _shapes(parts))
        transposed = bool(adapter.config.get("fan_in_fan_out"))
        found.late.append(
            SharedFactors(adapter.text, f"{module}.weight", *projection, parts["b"], parts["d"], transposed)
        )
    return found


def _read_loha(adapter: _Adapter) -> Contents:
    modules, full = adapter.parts(r"(.+)\.hada_(w1_a|w1_b|w2_a|w2_b|t1|t2)")
    found = Contents(full=full)
    for module, parts in modules.items():
        _require_parts(adapter, module, parts, ("w1_a", "w1_b", "w2_a", "w2_b"))
        pairs = [LoraFactors(parts[f"{one}_a"], parts[f"{one}_b"], 1.0) for one in ("w1", "w2")]
        scale = _scale(adapter, module, adapter.pattern("rank_pattern", module, "r"), "alpha")
        found.changes[f"{module}.weight"] = Hadamard(pairs[0], pairs[1], scale)
    return found


def _read_lokr(adapter: _Adapter) -> Contents:
    modules, full = adapter.parts(r"(.+)\.lokr_(w1|w1_a|w1_b|w2|w2_a|w2_b|t2)")
    found = Contents(full=full)
    for module, parts in modules.items():
        sides = [(one,) if one in parts else (f"{one}_a", f"{one}_b") for one in ("w1", "w2")]
        _require_parts(adapter, module, parts, [name for side in sides for name in side])
        first, second = (
            parts[side[0]] if len(side) == 1 else (parts[side[0]] @ parts[side[1]]).contiguous() for side in sides
        )
        scale = _scale(adapter, module, adapter.pattern("rank_pattern", module, "r"), "alpha")
        found.changes[f"{module}.weight"] = Kronecker(first, second, scale)
    return found


def _read_ia3(adapter: _Adapter) -> Contents:
    modules, full = adapter.parts(r"(.+)\.(ia3_l)")
    found = Contents(full=full)
    for module, parts in modules.items():
        vector = parts["ia3_l"]
        if vector.ndim != 2 or 1 not in vector.shape:
            raise _misfit(adapter, module, "one number per input or per output", _shapes(parts))
        of_inputs = vector.shape[0] == 1
        by_columns = of_inputs != bool(adapter.config.get("fan_in_fan_out"))
        found.late.append(LateBias(module, vector.flatten(), by_columns, of_inputs))
    return found


def _read_oft(adapter: _Adapter) -> Contents:
    if adapter.config.get("coft"):
        raise _unsupported(adapter.text, "constrained OFT (coft), whose rotations are projected when they are used")
    if adapter.config.get("fan_in_fan_out"):
        raise _unsupported(adapter.text, "OFT of transposed layers (fan_in_fan_out)")
    modules, full = adapter.parts(r"(.+)\.oft_(R)(?:\.weight)?")
    found = Contents(full=full)
    for module, parts in modules.items():
        if parts["R"].ndim != 2:
            raise _misfit(adapter, module, "a matrix oft_R", _shapes(parts))
        blocks = _cayley(parts["R"], adapter.config)
        found.late.append(LateRotation(f"{module}.weight", blocks, bool(adapter.config.get("block_share"))))
    return found


def _read_norms(adapter: _Adapter) -> Contents:
    return Contents(
        full={plain_name(key).replace(".ln_tuning_layers.", "."): one for key, one in adapter.tensors.items()}
    )


def _cayley(upper: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Return the rotation of each row of `upper`, which holds the upper triangle of a skew-symmetric matrix."""
    size = (1 + math.isqrt(1 + 8 * upper.shape[1])) // 2
    rows, columns = torch.triu_indices(size, size, 1)
    skew = torch.zeros(upper.shape[0], size, size)
    skew[:, rows, columns] = upper
    skew = skew - skew.transpose(-2, -1)
    eye = torch.eye(size).expand_as(skew)
    if not config.get("use_cayley_neumann", True):
        return torch.linalg.solve(eye + skew, eye - skew, left=False)
    # (I + Q)(I - Q)^-1 as a series: I + 2 Q + 2 Q^2 + ..., the last power once.
    terms = int(config.get("num_cayley_neumann_terms", 5))
    # PEFT's series of three terms is its series of four.
    terms = 4 if terms == 3 else terms
    total, power = eye.clone(), eye
    for index in range(1, terms):
        power = power @ skew
        total += power if index == terms - 1 and terms > 2 else 2.0 * power
    return total


_READERS: dict[str, Reader] = {
    "LORA": _read_lora,
    "ADALORA": _read_adalora,
    "VERA": _read_vera,
    "LOHA": _read_loha,
    "LOKR": _read_lokr,
    "IA3": _read_ia3,
    "OFT": _read_oft,
    "LN_TUNING": _read_norms,
    "TRAINABLE_TOKENS": _read_tokens,
}
