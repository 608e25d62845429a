# SPDX-License-Identifier: Apache-2.0
"""The same recipe through mergekit, a separate program, and through `keelwright repair`: the same weights.

`KEELWRIGHT_MERGEKIT` names the program `mergekit-yaml`, version 0.1.5, in an environment of its own. Differences are
counted in units in the last place of the largest number that goes into an entry: where large terms cancel, a unit of
the small result would say nothing.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PROGRAM = os.environ.get("KEELWRIGHT_MERGEKIT", "")
pytestmark = [
    pytest.mark.slow,  # the other program starts for every recipe
    pytest.mark.skipif(not PROGRAM, reason="KEELWRIGHT_MERGEKIT does not name mergekit-yaml"),
]
Weights = dict[str, Tensor]
# Tuned from `a`: their entries have no equal magnitudes. `far` has nothing to do with it.
SEEDS = {"a": 0, "b": 1, "c": 2, "far": None}


def make(folder: Path, seed: int | None) -> None:
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    parent = torch.Generator().manual_seed(0 if seed is not None else 9)
    own = torch.Generator().manual_seed(seed or 0)
    with torch.no_grad():
        for values in model.parameters():
            values.copy_(torch.randn(values.shape, generator=parent) * 0.3)
            if seed:
                values.add_(torch.randn(values.shape, generator=own) * 0.03)
    model.save_pretrained(folder)
    words = {word: index for index, word in enumerate(["<pad>", "<bos>", "<end>", "<unk>", *"abcdefgh"])}
    core = Tokenizer(WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>").save_pretrained(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models."""
    found = tmp_path_factory.mktemp("models")
    for name, seed in SEEDS.items():
        make(found / name, seed)
    return found


@pytest.fixture(scope="module")
def both(place: Path, keelwright: Callable[..., Any]) -> Callable[..., tuple[Path, Path]]:
    """Run a recipe through both programs; return the output folders, mergekit's first."""

    def go(name: str, recipe: Mapping[str, Any]) -> tuple[Path, Path]:
        path = place / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"dtype": "float32", **recipe}))
        theirs, ours = place / f"{name}-theirs", place / f"{name}-ours"
        line = [PROGRAM, path.name, theirs.name, "--no-write-model-card", "--quiet", "--random-seed", "3"]
        done = subprocess.run(
            line, cwd=place, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        keelwright("repair", path.name, "--out", ours.name, "--offline", cwd=place)
        return theirs, ours

    return go


def weights_of(folder: Path) -> Weights:
    found: Weights = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    return found


def spacing(values: Tensor) -> Tensor:
    """Return the distance of each number to the next larger one of its dtype."""
    above = torch.nextafter(values.abs(), torch.full_like(values, math.inf))
    return (above - values.abs()).double()


def worst(theirs: Weights, ours: Mapping[str, Tensor], scale: Mapping[str, Tensor]) -> float:
    """Return the largest difference in units in the last place of `scale`."""
    assert theirs.keys() == ours.keys()
    assert all(theirs[name].dtype == ours[name].dtype for name in theirs if ours[name].dtype != torch.float64)
    return max(
        float(((theirs[name].double() - ours[name].double()).abs() / spacing(scale[name])).max()) for name in theirs
    )


def largest(*models: Weights) -> Weights:
    return {name: torch.stack([one[name].abs() for one in models]).amax(0) for name in models[0]}


def sources(*names: str, **parameters: float) -> list[dict[str, Any]]:
    return [{"model": name, **({"parameters": parameters} if parameters else {})} for name in names]


def weighted(*pairs: tuple[str, float], **parameters: float) -> list[dict[str, Any]]:
    return [{"model": name, "parameters": {"weight": weight, **parameters}} for name, weight in pairs]


PAIR = (("b", 0.7), ("c", 0.4))
RECIPES: dict[str, tuple[float, dict[str, Any]]] = {
    # Here the two do the same steps: not a bit differs.
    "task_arithmetic": (0, {"base_model": "a", "models": weighted(*PAIR), "parameters": {"lambda": 0.8}}),
    "ties": (0, {"base_model": "a", "models": weighted(*PAIR, density=0.3)}),
    "ties, plain sum": (
        0,
        {"base_model": "a", "models": weighted(*PAIR, density=0.6), "parameters": {"normalize": False, "lambda": 0.9}},
    ),
    "breadcrumbs": (0, {"base_model": "a", "models": weighted(*PAIR, density=0.6, gamma=0.1)}),
    "breadcrumbs_ties": (0, {"base_model": "a", "models": weighted(*PAIR, density=0.6, gamma=0.1)}),
    "ram": (0, {"base_model": "a", "models": sources("b", "c")}),
    "ramplus_tl": (0, {"base_model": "a", "models": sources("b", "c"), "parameters": {"epsilon": 0.03}}),
    "arcee_fusion": (0, {"base_model": "a", "models": sources("a", "b")}),
    "passthrough": (0, {"models": [{"model": "b", "parameters": {"scale": 0.7}}]}),
    "linear": (1, {"models": weighted(("a", 0.6), ("b", 0.4))}),
    # Other steps, so other roundings: each has its own distance from the exact value.
    "linear, three": (3, {"models": weighted(("a", 0.6), ("b", 0.3), ("c", 0.7))}),
    "linear, plain sum": (
        3,
        {"models": weighted(("a", 0.6), ("b", 0.3), ("c", 0.7)), "parameters": {"normalize": False}},
    ),
    "slerp": (4, {"base_model": "a", "models": sources("a", "b"), "parameters": {"t": 0.35}}),
    "slerp, far": (4, {"base_model": "a", "models": sources("a", "far"), "parameters": {"t": 0.35}}),
    "nearswap": (4, {"base_model": "a", "models": sources("a", "b"), "parameters": {"t": 0.02}}),
    "sce": (4, {"base_model": "a", "models": sources("b", "c")}),
    "sce, the most varied": (
        4,
        {"base_model": "a", "models": sources("b", "c"), "parameters": {"select_topk": 0.4}},
    ),
    # The other program sums squares and products in float32.
    "nuslerp": (8, {"models": weighted(("b", 1.0), ("c", 2.0))}),
    "nuslerp, based": (8, {"base_model": "a", "models": weighted(("b", 1.0), ("c", 2.0))}),
    "nuslerp, last axis": (
        8,
        {"models": weighted(("b", 1.0), ("c", 2.0)), "parameters": {"nuslerp_flatten": False}},
    ),
    "nuslerp, first axis": (
        8,
        {
            "models": weighted(("b", 1.0), ("c", 2.0)),
            "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
        },
    ),
    "multislerp": (8, {"models": weighted(("b", 1.0), ("c", 2.0))}),
    "karcher": (8, {"models": sources("a", "b", "c")}),
    "model_stock": (12, {"base_model": "a", "models": sources("b", "c")}),
    "model_stock, rows": (
        12,
        {"base_model": "a", "models": sources("b", "c"), "parameters": {"filter_wise": True}},
    ),
    # How a file is read: gradients, filters, slices, precedence.
    "slerp, gradients and filters": (
        4,
        {
            "base_model": "a",
            "slices": [{"sources": [{"model": one, "layer_range": [0, 4]} for one in ("a", "far")]}],
            "parameters": {
                "t": [
                    {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
                    {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
                    {"value": 0.5},
                ]
            },
        },
    ),
    "ties, gradients and filters": (
        0,
        {
            "base_model": "a",
            "models": [
                {
                    "model": "b",
                    "parameters": {
                        "density": [1, 0.7, 0.1],
                        "weight": [{"filter": "mlp", "value": 0.5}, {"value": 0.3}],
                    },
                },
                {"model": "c", "parameters": {"density": 0.33, "weight": [0.2, 0.8]}},
            ],
            "parameters": {"density": 0.9, "normalize": True},
        },
    ),
    "passthrough, slices": (
        0,
        {
            "slices": [
                {"sources": [{"model": "a", "layer_range": [0, 3]}]},
                {"sources": [{"model": "b", "layer_range": [1, 4], "parameters": {"scale": 0.5}}]},
            ]
        },
    ),
    "task_arithmetic, slices": (
        0,
        {
            "base_model": "a",
            "slices": [
                {
                    "sources": [
                        {"model": "a", "layer_range": [0, 2]},
                        {"model": "b", "layer_range": [0, 2], "parameters": {"weight": [0.2, 0.9]}},
                    ]
                },
                {
                    "sources": [
                        {"model": "a", "layer_range": [2, 4]},
                        {"model": "c", "layer_range": [2, 4], "parameters": {"weight": 0.6}},
                    ],
                    "parameters": {"lambda": 0.5},
                },
            ],
        },
    ),
}  # fmt: skip


def named(recipe: Any) -> set[str]:
    """Return the models that a recipe reads."""
    if isinstance(recipe, list):
        return set().union(*map(named, recipe))
    if not isinstance(recipe, dict):
        return set()
    own = {value for key, value in recipe.items() if key in ("model", "base_model")}
    return own.union(*(named(value) for value in recipe.values()))


def method_of(name: str) -> str:
    return name.partition(",")[0]


@pytest.mark.parametrize("name", RECIPES)
def test_the_same_recipe_gives_the_same_weights(name: str, place: Path, both: Callable[..., tuple[Path, Path]]) -> None:
    units, recipe = RECIPES[name]
    theirs, ours = both(name.replace(", ", "-").replace(" ", "_"), {"merge_method": method_of(name), **recipe})
    models = [weights_of(place / one) for one in named(recipe)]
    made = weights_of(theirs)
    # A slice may give a layer another number: then the largest number of the tensor's kind serves.
    inputs = largest(*models)
    scale = {key: inputs[key] if key in inputs and "slices" not in name else made[key].abs().amax() for key in made}
    difference = worst(made, weights_of(ours), scale)
    print(f"{name}: {difference:.3g} units")
    assert difference <= units
    layers = [json.loads((one / "config.json").read_text())["num_hidden_layers"] for one in (theirs, ours)]
    assert layers[0] == layers[1]


def exact_linear(models: Mapping[str, Weights]) -> Weights:
    a, b, c = (models[name] for name in "abc")
    return {key: (0.6 * a[key].double() + 0.3 * b[key].double() + 0.7 * c[key].double()) / 1.6 for key in a}


def exact_slerp(models: Mapping[str, Weights]) -> Weights:
    found = {}
    for key, values in models["a"].items():
        base, other = values.double(), models["far"][key].double()
        angle = math.acos(float((base * other).sum() / (base.norm() * other.norm())))
        parts = (math.sin(0.65 * angle) * base + math.sin(0.35 * angle) * other) / math.sin(angle)
        found[key] = parts
    return found


@pytest.mark.parametrize(
    ("name", "exact"), [("linear, three", exact_linear), ("slerp, far", exact_slerp)], ids=["linear", "slerp"]
)
def test_where_the_two_differ_ours_is_not_the_one_further_from_the_exact_value(
    name: str, exact: Callable[[Mapping[str, Weights]], Weights], place: Path, both: Callable[..., tuple[Path, Path]]
) -> None:
    method = method_of(name)
    theirs, ours = both(f"exact-{method}", {"merge_method": method, **RECIPES[name][1]})
    models = {one: weights_of(place / one) for one in SEEDS}
    wanted, scale = exact(models), largest(*(models[one] for one in named(RECIPES[name][1])))
    errors = [worst(weights_of(one), wanted, scale) for one in (theirs, ours)]
    print(f"{name}: mergekit {errors[0]:.3g}, keelwright {errors[1]:.3g} units from the exact value")
    assert errors[1] <= max(2.0, errors[0])


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_what_the_other_program_computes_in_float32_too_agrees_in_bfloat16(
    method: str, place: Path, both: Callable[..., tuple[Path, Path]]
) -> None:
    recipe = {**RECIPES[method][1], "merge_method": method, "dtype": "bfloat16"}
    theirs, ours = both(f"half-{method}", recipe)
    scale = {
        key: values.to(torch.bfloat16) for key, values in largest(*(weights_of(place / one) for one in "ab")).items()
    }
    # The other program rounds its inputs to bfloat16 first.
    assert worst(weights_of(theirs), weights_of(ours), scale) <= 1


RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
DENSITY = 0.6


@pytest.mark.parametrize("method", RANDOM)
def test_random_masks_keep_as_much_and_restore_the_same_norm(
    method: str, place: Path, both: Callable[..., tuple[Path, Path]]
) -> None:
    extra = {"epsilon": 0.3} if method.startswith("della") else {}
    recipe = {"merge_method": method, "base_model": "a", "models": weighted(("b", 1.0), density=DENSITY, **extra)}
    base, tuned = weights_of(place / "a"), weights_of(place / "b")
    deltas = {name: tuned[name] - base[name] for name in base}
    # Of each row the half of the smaller and the half of the larger magnitudes, where rows are long enough to halve.
    upper = {name: d.abs() > d.abs().median(-1, keepdim=True).values for name, d in deltas.items()}
    shares = []
    for folder in both(method, recipe):
        made = weights_of(folder)
        kept = {name: made[name] != base[name] for name in base}
        for name, delta in deltas.items():
            if kept[name].any():
                # `rescale: true` is the form that restores the sum of magnitudes.
                total = float((made[name] - base[name]).double().abs().sum())
                assert total == pytest.approx(float(delta.double().abs().sum()), rel=1e-4)
        halves = []
        for choose in (upper, {name: ~one for name, one in upper.items()}):
            chosen = torch.cat([kept[name][choose[name]] for name in kept])
            halves.append((float(chosen.float().mean()), chosen.numel()))
        whole = torch.cat([one.flatten() for one in kept.values()]).float()
        assert float(whole.mean()) == pytest.approx(DENSITY, abs=5 * math.sqrt(DENSITY * (1 - DENSITY) / len(whole)))
        shares.append(halves)
    for (theirs, count), (ours, _) in zip(*shares, strict=True):
        assert ours == pytest.approx(theirs, abs=5 * math.sqrt(2 * 0.25 / count))
    if method.startswith("della"):
        assert all(halves[0][0] > halves[1][0] + 0.1 for halves in shares)
