# SPDX-License-Identifier: Apache-2.0
"""Recipes from the file to a model that loads: ours and mergekit's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from keelwright.cli.app import app
from keelwright.weights.lock import verify

RUN = CliRunner()
BASE, ALIGNED = "lab:workshop/base", "lab:workshop/aligned"
MERGEKIT = f"""
merge_method: task_arithmetic
base_model: {BASE}
models:
  - model: {ALIGNED}
    parameters:
      weight:
        - filter: mlp
          value: [0.0, 1.0]
        - value: 0.5
dtype: float32
"""
SLICES = f"""
merge_method: passthrough
slices:
  - sources: [{{model: {ALIGNED}, layer_range: [0, 3]}}]
  - sources: [{{model: {ALIGNED}, layer_range: [2, 4]}}]
dtype: bfloat16
"""
OURS = f"""
keelwright: 1
method: linear
aligned: {BASE}
tuned: {ALIGNED}
coefficient: [0.2, 0.8]
"""


def tensors(model: str) -> dict[str, torch.Tensor]:
    folder = Path(__file__).parents[2] / "src" / "keelwright" / "organisms" / model.removeprefix("lab:")
    return load_file(folder / "model.safetensors")


def written(tmp_path: Path, text: str, *more: str) -> tuple[Path, dict]:
    (tmp_path / "recipe.yaml").write_text(text)
    out = tmp_path / "out"
    done = RUN.invoke(app, ["repair", str(tmp_path / "recipe.yaml"), "--out", str(out), "--json", *more])
    assert done.exit_code == 0, done.stderr
    verify(out)
    return out, json.loads(done.stdout)


def test_a_mergekit_recipe_resolves_filters_and_gradients_per_tensor(tmp_path):
    out, result = written(tmp_path, MERGEKIT)
    base, aligned, found = tensors(BASE), tensors(ALIGNED), load_file(out / "model.safetensors")
    assert result["method"] == "task_arithmetic" and result["tensors"] == len(found)
    for name, tensor in found.items():
        weight = int(name.split(".")[2]) / 3 if "mlp" in name else 0.5
        expected = base[name].float() + weight * (aligned[name].float() - base[name].float())
        assert tensor.dtype is torch.float32
        assert torch.allclose(tensor, expected, atol=1e-6), name
    assert AutoModelForCausalLM.from_pretrained(out).config.tie_word_embeddings is True
    lock = json.loads((out / "merge.lock.json").read_text())
    assert any("weight 0.333333" in row for row in lock["settings"]["plan"])


def test_slices_stack_layers_and_the_model_loads(tmp_path):
    out, _ = written(tmp_path, SLICES)
    model, parent = AutoModelForCausalLM.from_pretrained(out), tensors(ALIGNED)
    assert model.config.num_hidden_layers == len(model.model.layers) == 5
    for layer, source in enumerate((0, 1, 2, 2, 3)):
        found = model.model.layers[layer].self_attn.q_proj.weight
        assert torch.equal(found, parent[f"model.layers.{source}.self_attn.q_proj.weight"])
    with torch.no_grad():
        assert model(torch.arange(1, 9)[None]).logits.isfinite().all()


def test_our_recipe_gives_every_layer_its_own_coefficient(tmp_path):
    out, _ = written(tmp_path, OURS)
    base, aligned, found = tensors(BASE), tensors(ALIGNED), load_file(out / "model.safetensors")
    for layer in range(4):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        share = 0.2 + 0.6 * layer / 3
        expected = ((1 - share) * base[name].float() + share * aligned[name].float()).to(torch.bfloat16)
        assert torch.equal(found[name], expected)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_bytes_do_not_depend_on_the_workers(tmp_path, workers):
    written(tmp_path, MERGEKIT)
    again = tmp_path / "again"
    again.mkdir()
    out, _ = written(again, MERGEKIT, "--workers", workers)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()


def test_explain_prints_the_plan_and_writes_nothing(tmp_path):
    (tmp_path / "recipe.yaml").write_text(OURS)
    done = RUN.invoke(app, ["repair", str(tmp_path / "recipe.yaml"), "--explain"])
    assert done.exit_code == 0
    assert "model.layers.1.*" in done.stdout and "coefficient 0.4" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
    rows = json.loads(RUN.invoke(app, ["repair", str(tmp_path / "recipe.yaml"), "--explain", "--json"]).stdout)["plan"]
    assert ["config, tokenizer from", "tuned"] in rows


@pytest.mark.parametrize(
    ("text", "more", "words"),
    [
        (OURS.replace("coefficient", "coeficient"), (), "did you mean 'coefficient'?"),
        (OURS.replace("linear", "lineer"), (), "lineer"),
        (MERGEKIT + "gate_mode: hidden\n", (), "mixture"),
        (OURS, ("--tuned", ALIGNED), "'--tuned' has no meaning with a recipe"),
        (OURS, ("--coefficient", "0.5"), "'--coefficient' has no meaning with a recipe"),
        (SLICES.replace("[2, 4]", "[2, 9]"), (), "layer"),
    ],
)
def test_a_wrong_recipe_is_an_error_that_says_what_to_do(tmp_path, text, more, words):
    (tmp_path / "recipe.yaml").write_text(text)
    done = RUN.invoke(app, ["repair", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out"), *more])
    assert done.exit_code == 2
    assert words.lower() in done.stderr.lower() and "fix:" in done.stderr
    assert not (tmp_path / "out").exists()
