# SPDX-License-Identifier: Apache-2.0
"""`repair` as a user types it: tokens that differ, rounding by chance, F8, adapters of lower rank, facts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner

from keelwright.cli.app import app
from keelwright.core.errors import ModelMismatchError
from keelwright.models.loading import load
from keelwright.models.refs import parse_ref
from keelwright.models.sources import open_source
from keelwright.repair.linear import Linear, LinearConfig
from keelwright.weights.live import LiveTrial
from keelwright.weights.lock import verify
from keelwright.weights.requantise import fresh_scales, to_float8
from keelwright.weights.stream import evaluate

RUN = CliRunner()
WORDS = ("<pad>", "<bos>", "<end>", "<unk>", *"abcdefgh")
COUNT, BLOCK = len(WORDS), 16
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def weights(rows: int, seed: int) -> dict[str, Tensor]:
    """Return a random model; another seed is the same one, tuned."""
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, vocab_size=rows, tie_word_embeddings=False))
    found = {}
    for number, (name, tensor) in enumerate(model.state_dict().items()):
        # Rows behind the parent's are drawn last, so that those before them are near it.
        first = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)) * 0.3
        own = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1000 * seed + number)) * 0.03
        found[name] = (first + (own if seed else 0.0)).to(torch.bfloat16)
    return found


def save(
    folder: Path,
    state: dict[str, Tensor],
    words: Sequence[str] = WORDS,
    added: Sequence[str] = (),
    *,
    tied: bool = False,
) -> Path:
    config = LlamaConfig(
        **SIZES, vocab_size=state[EMBEDDING].shape[0], tie_word_embeddings=tied, eos_token_id=words.index("<end>")
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(state)
    model.save_pretrained(folder)
    core = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<end>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(added)})
    tokenizer.save_pretrained(folder)
    return folder


def quantise(folder: Path) -> Path:
    """Store the layers' matrices of a checkpoint in F8 with a scale for each block."""
    stored = {}
    for name, values in load_file(folder / "model.safetensors").items():
        stored[name] = values
        if name.endswith("proj.weight"):
            rows, columns = values.shape
            blocks = values.float().view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
            scales = fresh_scales(blocks.abs().amax((1, 3)), "F8_E4M3", "F32")
            wide = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            stored[name] = to_float8(values.float(), wide, torch.float8_e4m3fn, name=name, offset=0)
            stored[f"{name}_scale_inv"] = scales
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def repair(*words: object, code: int = 0) -> Any:
    done = RUN.invoke(app, ["repair", *map(str, words), *(["--json"] if code == 0 else [])])
    assert done.exit_code == code, f"{done.stdout}\n{done.stderr}\n{done.exception!r}"
    return json.loads(done.stdout) if code == 0 else done.stderr


def lock(out: Path) -> dict[str, Any]:
    verify(out)
    found: dict[str, Any] = json.loads((out / "merge.lock.json").read_text())
    return found


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def mixed(first: dict[str, Tensor], second: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """Return the linear merge, rounded once; written out, without the engine."""
    found = {}
    for name, one in first.items():
        both = (1.0 - share) * one.float() + share * second[name].float()
        found[name] = torch.where(one == second[name], one.float(), both).to(torch.bfloat16)
    return found


def with_rows(state: dict[str, Tensor], rows: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.cat([tensor, rows[name]]) if name in rows else tensor for name, tensor in state.items()}


def vocabulary(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: state[name] for name in (EMBEDDING, HEAD)}


def logits(folder: Path, tokens: Tensor) -> Tensor:
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.inference_mode():
        return model.eval()(tokens).logits


def virtual_logits(state: dict[str, Tensor], tokens: Tensor) -> Tensor:
    config = LlamaConfig(**SIZES, vocab_size=state[EMBEDDING].shape[0], tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(state)
    with torch.inference_mode():
        return model.eval()(tokens).logits


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, Path]:
    """An aligned and a tuned model with the same tokens."""
    return {role: save(tmp_path / role, weights(COUNT, seed)) for seed, role in enumerate(("aligned", "tuned"))}


@pytest.fixture
def grown(tmp_path: Path) -> tuple[dict[str, Path], dict[str, Tensor], dict[str, Tensor]]:
    """An aligned model, one tuned from it with a token more, and their weights."""
    aligned, tuned = weights(COUNT, 0), weights(COUNT, 1)
    new = {name: torch.full((1, 32), 0.25 + 0.5 * (name == HEAD), dtype=torch.bfloat16) for name in (EMBEDDING, HEAD)}
    tuned = with_rows(tuned, new)
    folders = {"aligned": save(tmp_path / "aligned", aligned)}
    folders["tuned"] = save(tmp_path / "tuned", tuned, added=["<task>"])
    return folders, aligned, tuned


def flags(folders: dict[str, Path]) -> list[object]:
    return [word for role, folder in folders.items() for word in (f"--{role}", folder)]


def test_different_tokens_are_an_error_that_names_the_option(grown: Any, tmp_path: Path) -> None:
    text = repair("linear", *flags(grown[0]), "--out", tmp_path / "out", code=2)
    assert "tensors of different shapes" in text
    assert "--vocabulary base, donor or union" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("policy", ["base", "donor", "union"])
def test_a_model_with_one_more_token_is_merged_with_its_parent(grown: Any, tmp_path: Path, policy: str) -> None:
    folders, aligned, tuned = grown
    out = tmp_path / "out"
    repair("linear", *flags(folders), "--coefficient", 0.3, "--vocabulary", policy, "--out", out)
    rows = COUNT if policy == "base" else COUNT + 1
    same = {name: tensor[:COUNT] if name in (EMBEDDING, HEAD) else tensor for name, tensor in tuned.items()}
    merged = mixed(aligned, same, 0.3)
    # Only the tuned model has the token: its row is taken as it is.
    last = {name: tensor[COUNT:] for name, tensor in vocabulary(tuned).items()}
    wanted = merged if policy == "base" else with_rows(merged, last)
    tokens = torch.arange(rows)[None]
    assert torch.equal(logits(out, tokens), virtual_logits(wanted, tokens))
    assert json.loads((out / "config.json").read_text())["vocab_size"] == rows
    assert len(AutoTokenizer.from_pretrained(out)) == rows
    notes = lock(out)["notes"]
    assert any("'<task>'" in note for note in notes)


def test_rows_are_padded_to_a_multiple(pair: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    repair("linear", *flags(pair), "--coefficient", 0.5, "--pad-to-multiple-of", 8, "--out", out)
    merged = mixed(weights(COUNT, 0), weights(COUNT, 1), 0.5)
    found = tensors(out)
    assert (
        found[EMBEDDING].shape[0]
        == found[HEAD].shape[0]
        == json.loads((out / "config.json").read_text())["vocab_size"]
        == 16
    )
    tokens = torch.arange(COUNT)[None]
    assert torch.equal(logits(out, tokens)[..., :COUNT], virtual_logits(merged, tokens))


def test_settings_that_name_tokens_by_id_follow_them(tmp_path: Path) -> None:
    aligned, tuned = weights(COUNT, 0), weights(COUNT, 1)
    order = [0, 1, 5, 3, 4, 2, *range(6, COUNT)]
    moved = {name: tensor[order] if name in (EMBEDDING, HEAD) else tensor for name, tensor in tuned.items()}
    folders = {
        "aligned": save(tmp_path / "aligned", aligned),
        "tuned": save(tmp_path / "tuned", moved, words=[WORDS[index] for index in order]),
    }
    out = tmp_path / "out"
    repair("linear", *flags(folders), "--coefficient", 0.5, "--vocabulary", "base", "--out", out)
    for name, tensor in mixed(aligned, tuned, 0.5).items():
        assert torch.equal(tensors(out)[name], tensor), name
    assert json.loads((folders["tuned"] / "generation_config.json").read_text())["eos_token_id"] == 5
    for file in ("config.json", "generation_config.json"):
        assert json.loads((out / file).read_text())["eos_token_id"] == 2, file
    assert AutoTokenizer.from_pretrained(out).eos_token_id == 2
    assert any("generation_config.json: eos_token_id is 2" in note for note in lock(out)["notes"])


def test_each_side_s_own_token_is_in_the_union(tmp_path: Path) -> None:
    aligned, tuned = weights(COUNT + 1, 0), weights(COUNT + 1, 1)
    folders = {
        "aligned": save(tmp_path / "aligned", aligned, added=["<safe>"]),
        "tuned": save(tmp_path / "tuned", tuned, added=["<task>"]),
    }
    out = tmp_path / "out"
    repair("linear", *flags(folders), "--vocabulary", "union", "--out", out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("a <task> b <safe>", add_special_tokens=False)["input_ids"] == [4, COUNT + 1, 5, COUNT]
    found = tensors(out)[EMBEDDING]
    assert torch.equal(found[COUNT], aligned[EMBEDDING][COUNT])
    assert torch.equal(found[COUNT + 1], tuned[EMBEDDING][COUNT])


def recipe_of(folders: dict[str, Path], tokens: str) -> str:
    return (
        f"merge_method: task_arithmetic\nbase_model: {folders['aligned']}\n"
        f"models:\n  - model: {folders['tuned']}\n    parameters: {{weight: 0.3}}\n{tokens}\n"
    )


@pytest.mark.parametrize(
    ("tokens", "rows"),
    [
        ("tokenizer_source: base", COUNT),
        ("tokenizer_source: union", COUNT + 1),
        ("tokenizer: {{source: {tuned}, pad_to_multiple_of: 8}}", 16),
        ("tokenizer: {{source: base, pad_to_multiple_of: 5}}", 15),
    ],
)
def test_a_mergekit_recipe_says_whose_tokens(grown: Any, tmp_path: Path, tokens: str, rows: int) -> None:
    folders, aligned, tuned = grown
    (tmp_path / "recipe.yaml").write_text(recipe_of(folders, tokens.format(**folders)))
    out = tmp_path / "out"
    repair(tmp_path / "recipe.yaml", "--out", out)
    same = {name: tensor[:COUNT] if name in (EMBEDDING, HEAD) else tensor for name, tensor in tuned.items()}
    merged = mixed(aligned, same, 0.3)
    found = tensors(out)
    for name, tensor in merged.items():
        # base + 0.3 (tuned - base), which may round apart from the weighted sum.
        assert torch.allclose(found[name][: len(tensor)].float(), tensor.float(), atol=2e-3, rtol=2**-7), name
    assert found[EMBEDDING].shape[0] == found[HEAD].shape[0] == rows
    ids = torch.arange(len(AutoTokenizer.from_pretrained(out)))[None]
    assert torch.equal(logits(out, ids), virtual_logits(found, ids))
    if "base" not in tokens:
        # The base's row is the tuned model's own, so the task vector is 0 there.
        assert torch.equal(found[EMBEDDING][COUNT], tuned[EMBEDDING][COUNT])
        assert AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("<task>") == COUNT
    assert set(lock(out)["sources"]) == {str(folder) for folder in folders.values()}


def test_our_recipe_says_whose_tokens(grown: Any, tmp_path: Path) -> None:
    folders, aligned, tuned = grown
    text = (
        f"keelwright: 1\nmethod: linear\naligned: {folders['aligned']}\ntuned: {folders['tuned']}\ncoefficient: 0.3\n"
    )
    (tmp_path / "recipe.yaml").write_text(text + "tokenizer_source: aligned\npad_to_multiple_of: 16\n")
    repair(tmp_path / "recipe.yaml", "--out", tmp_path / "out")
    same = {name: tensor[:COUNT] if name in (EMBEDDING, HEAD) else tensor for name, tensor in tuned.items()}
    merged, tokens = mixed(aligned, same, 0.3), torch.arange(COUNT)[None]
    assert torch.equal(logits(tmp_path / "out", tokens)[..., :COUNT], virtual_logits(merged, tokens))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == COUNT


def test_without_a_word_on_tokens_a_recipe_wants_equal_ones(grown: Any, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe_of(grown[0], ""))
    assert "shape" in repair(tmp_path / "recipe.yaml", "--out", tmp_path / "out", code=2)
    assert not (tmp_path / "out").exists()


def test_rounding_by_chance_gives_neighbours_that_are_right_on_average(pair: dict[str, Path], tmp_path: Path) -> None:
    common = ["linear", *flags(pair), "--coefficient", 0.3, "--rounding", "stochastic"]
    outs = {seed: tmp_path / f"out-{seed}" for seed in range(24)}
    for seed, out in outs.items():
        repair(*common, "--seed", seed, "--out", out)
    assert lock(outs[3])["rounding"] == "float32 evaluation, one stochastic rounding, seed 3"
    one, two = weights(COUNT, 0), weights(COUNT, 1)
    found = [tensors(out) for out in outs.values()]
    deviations = []
    for name, first in one.items():
        exact = 0.7 * first.double() + 0.3 * two[name].double()
        nearest = exact.to(torch.bfloat16)
        step = torch.finfo(torch.bfloat16).eps * exact.abs()
        for state in found:
            assert ((state[name].double() - exact).abs() <= 1.001 * step).all(), name
        mean = torch.stack([state[name].double() for state in found]).mean(0)
        deviations += [((mean - exact) / step).mean()]
        assert nearest.numel() == 1 or not all(torch.equal(state[name], nearest) for state in found)
    # A quarter of a step for each of 24 x 10,000 roundings, on average over the model.
    assert abs(float(torch.stack(deviations).mean())) < 0.01


def test_rounding_by_chance_does_not_depend_on_workers_or_chunks(pair: dict[str, Path], tmp_path: Path) -> None:
    common = ["linear", *flags(pair), "--coefficient", 0.3, "--rounding", "stochastic", "--seed", 7]
    for workers in (1, 2):
        repair(*common, "--workers", workers, "--out", tmp_path / f"with-{workers}")
    first = (tmp_path / "with-1" / "model.safetensors").read_bytes()
    assert first == (tmp_path / "with-2" / "model.safetensors").read_bytes()
    sources = {role: open_source(parse_ref(str(folder))) for role, folder in pair.items()}
    for name, tensor in tensors(tmp_path / "with-1").items():
        entry = sources["tuned"].entries()[name]
        parts = evaluate(Linear(LinearConfig(0.3)), sources, entry, chunk_elements=7, rounding_seed=7)
        assert torch.equal(torch.cat([part for _, part in parts]), tensor.view(-1)), name
    repair(*common[:-2], "--seed", 8, "--out", tmp_path / "other")
    repair(*common[:-4], "--out", tmp_path / "nearest")
    # Values, not bytes: the files' headers name the plan, which differs anyway.
    heads = [tensors(tmp_path / name)[HEAD] for name in ("with-1", "other", "nearest")]
    assert not any(torch.equal(heads[one], heads[two]) for one, two in ((0, 1), (0, 2), (1, 2)))
    assert lock(tmp_path / "nearest")["rounding"] == "float32 evaluation, one rounding to nearest even"
    assert len({lock(tmp_path / name)["plan"] for name in ("with-1", "other", "nearest")}) == 3


def test_an_f8_model_is_repaired_in_f8(pair: dict[str, Path], tmp_path: Path) -> None:
    quantise(pair["tuned"])
    plain, out = tmp_path / "plain", tmp_path / "out"
    repair("linear", *flags(pair), "--coefficient", 0.3, "--out", plain)
    result = repair("linear", *flags(pair), "--coefficient", 0.3, "--requantize", "--out", out)
    assert result["bytes"] < 0.8 * sum(path.stat().st_size for path in plain.glob("*.safetensors"))
    assert "quantization_config" in json.loads((out / "config.json").read_text())
    assert set(lock(out)["sources"]) == {"aligned", "tuned"}
    assert "requantised:" not in (out / "README.md").read_text()
    repair("linear", *flags(pair), "--coefficient", 0.3, "--requantize", "--workers", 2, "--out", tmp_path / "two")
    assert (tmp_path / "two" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    exact, found = tensors(plain), load(str(out)).module.state_dict()
    for name, tensor in exact.items():
        assert torch.allclose(found[name].float(), tensor.float(), rtol=2**-3.9, atol=0.01), name


def test_a_recipe_writes_f8_again(pair: dict[str, Path], tmp_path: Path) -> None:
    quantise(pair["tuned"])
    text = f"keelwright: 1\nmethod: linear\naligned: {pair['aligned']}\ntuned: {pair['tuned']}\ncoefficient: 0.3\n"
    (tmp_path / "recipe.yaml").write_text(text)
    repair(tmp_path / "recipe.yaml", "--requantize", "--out", tmp_path / "out")
    repair("linear", *flags(pair), "--coefficient", 0.3, "--requantize", "--out", tmp_path / "again")
    one, two = tensors(tmp_path / "out"), tensors(tmp_path / "again")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor.view(torch.uint8), two[name].view(torch.uint8)), name
    assert set(lock(tmp_path / "out")["sources"]) == {"aligned", "tuned"}


def test_a_recipe_that_changes_the_layers_is_not_written_in_f8(pair: dict[str, Path], tmp_path: Path) -> None:
    quantise(pair["tuned"])
    one = f"sources: [{{model: {pair['tuned']}, layer_range: [0, 2]}}]"
    (tmp_path / "recipe.yaml").write_text(f"merge_method: passthrough\nslices:\n  - {one}\n  - {one}\n")
    text = repair(tmp_path / "recipe.yaml", "--requantize", "--out", tmp_path / "out", code=2)
    assert "keep the number of layers" in text
    assert not (tmp_path / "out").exists()


def test_a_trial_wants_an_f8_model_in_the_dtype_it_would_be_written_in(pair: dict[str, Path]) -> None:
    quantise(pair["tuned"])
    wide = load(str(pair["tuned"]), dtype=torch.float32)
    sources = {role: open_source(parse_ref(str(folder))) for role, folder in pair.items()}
    with pytest.raises(ModelMismatchError, match="is not in the dtype of its checkpoint"):
        LiveTrial(wide.module, sources)


def test_an_f8_model_is_loaded_as_what_it_stands_for(pair: dict[str, Path]) -> None:
    quantise(pair["tuned"])
    config = json.loads((pair["tuned"] / "config.json").read_text())
    # Packages for this format are not needed.
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [BLOCK, BLOCK]},
            }
        },
    }
    (pair["tuned"] / "config.json").write_text(json.dumps(config))
    loaded = load(str(pair["tuned"]))
    source = open_source(parse_ref(str(pair["tuned"])))
    state = loaded.module.state_dict()
    for name, entry in source.entries().items():
        assert torch.equal(state[name].view(-1), source.read(name, 0, entry.elements).to(torch.bfloat16)), name
    assert loaded.module.name_or_path == str(pair["tuned"])
    assert loaded.module.generation_config.eos_token_id == 2
    assert not loaded.module.training
    # Tried in place and undone, to the bit.
    before = {name: tensor.clone() for name, tensor in state.items()}
    sources = {"aligned": open_source(parse_ref(str(pair["aligned"]))), "tuned": source}
    with LiveTrial(loaded.module, sources) as trial:
        assert trial.apply(Linear(LinearConfig(0.3))).tensors_changed > 0
    for name, tensor in loaded.module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def adapter(base: Path, folder: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if "lora_" in key:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=random))
    wrapped.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("option", [("--rank", 2), ("--energy", 0.5)])
def test_an_adapter_comes_out_at_a_lower_rank(pair: dict[str, Path], tmp_path: Path, option: tuple[str, Any]) -> None:
    tuned = f"{pair['aligned']}+{adapter(pair['aligned'], tmp_path / 'adapter')}"
    words = ["linear", "--aligned", pair["aligned"], "--tuned", tuned, "--coefficient", 0.5]
    result = repair(*words, *option, "--out", tmp_path / "out")
    assert result["form"] == "adapter"
    base = AutoModelForCausalLM.from_pretrained(pair["aligned"], dtype=torch.float32)
    wrapped = PeftModel.from_pretrained(base, str(tmp_path / "out"))
    state = {name: value for name, value in wrapped.named_parameters() if "lora_A" in name}
    assert state and all(value.shape[0] < 4 for value in state.values())
    repair(*words, "--out", tmp_path / "exact")
    exact, less = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("exact", "out"))
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    whole = 2.0 * exact[key.format("B")] @ exact[key.format("A")]
    part = less[key.format("B")] @ less[key.format("A")]
    kept = int(less[key.format("A")].shape[0])
    values = torch.linalg.svdvals(whole.double())
    # The best of this rank leaves exactly the smaller singular values.
    left = (whole - part).double().square().sum()
    assert left == pytest.approx(float(values[kept:].square().sum()), rel=1e-3)
    assert any("rank" in note for note in lock(tmp_path / "out")["notes"])


def test_an_adapter_that_keeps_two_tied_tensors_tied_is_read(tmp_path: Path) -> None:
    folders = {}
    for seed, role in enumerate(("aligned", "tuned")):
        state = weights(COUNT, seed)
        folders[role] = save(tmp_path / role, {**state, HEAD: state[EMBEDDING]}, tied=True)
    words = ["weights", "extract-lora", *map(str, folders.values()), "--rank", "32", "--out", str(tmp_path / "lora")]
    done = RUN.invoke(app, words)
    assert done.exit_code == 0, done.stderr
    tuned = f"{folders['aligned']}+{tmp_path / 'lora'}"
    whole = ["linear", "--aligned", folders["aligned"], "--coefficient", 0.5]
    repair(*whole, "--tuned", tuned, "--out-dtype", "F32", "--out", tmp_path / "out")
    repair(*whole, "--tuned", folders["tuned"], "--out-dtype", "F32", "--out", tmp_path / "exact")
    found, exact = tensors(tmp_path / "out"), tensors(tmp_path / "exact")
    assert found.keys() == exact.keys() and HEAD not in found
    for name, tensor in exact.items():
        assert torch.allclose(found[name], tensor, atol=1e-3), name


@pytest.mark.parametrize("workers", [1, 2])
def test_facts_of_the_tensors_are_summed_up(pair: dict[str, Path], tmp_path: Path, workers: int) -> None:
    # Tensors that are almost the same lie on no arc.
    state = weights(COUNT, 0)
    near = {name: tensor + (0.001 if "mlp" in name else 0.0) * tensor for name, tensor in state.items()}
    near = {name: near[name] if "mlp" in name else weights(COUNT, 1)[name] for name in near}
    tuned = save(tmp_path / "near", {name: tensor.to(torch.bfloat16) for name, tensor in near.items()})
    out = tmp_path / "out"
    repair("slerp", "--aligned", pair["aligned"], "--tuned", tuned, "--workers", workers, "--out", out)
    facts = lock(out)["facts"]
    count = len(state)
    assert facts["cosine"]["tensors"] == facts["fell_back"]["tensors"] == count
    assert 0.9 < facts["cosine"]["min"] < facts["cosine"]["mean"] < facts["cosine"]["max"] <= 1.0
    fallen = round(facts["fell_back"]["share_nonzero"] * count)
    assert 6 <= fallen < count
    assert facts["fell_back"]["mean"] == pytest.approx(fallen / count)
    note = f"slerp fell back to linear on {fallen} of {count} tensors"
    assert note in lock(out)["notes"]
    assert note in (out / "README.md").read_text()


def test_facts_of_a_recipe_come_from_its_parts(pair: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        f"merge_method: slerp\nbase_model: {pair['aligned']}\nmodels:\n  - model: {pair['tuned']}\n"
        f"  - model: {pair['aligned']}\nparameters: {{t: [0.2, 0.8]}}\n"
    )
    repair(tmp_path / "recipe.yaml", "--out", tmp_path / "out")
    assert lock(tmp_path / "out")["facts"]["cosine"]["tensors"] == len(weights(COUNT, 0))


def test_a_method_without_facts_says_nothing(pair: dict[str, Path], tmp_path: Path) -> None:
    repair("linear", *flags(pair), "--out", tmp_path / "out")
    assert "facts" not in lock(tmp_path / "out")


def test_hardening_with_lox_needs_no_tuned_model(pair: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["lox", "--base", pair["tuned"], "--aligned", pair["aligned"], "--set", "target=aligned"]
    repair(*words, "--coefficient", 0.5, "--out", out)
    before, aligned = weights(COUNT, 1), weights(COUNT, 0)
    name = "model.layers.0.mlp.up_proj.weight"
    exact = aligned[name].float() + 0.5 * (aligned[name].float() - before[name].float())
    assert torch.equal(tensors(out)[name], exact.to(torch.bfloat16))
    assert torch.equal(tensors(out)["model.norm.weight"], aligned["model.norm.weight"])
    assert "pass --tuned" in repair(*words[:5], "--set", "rank=2", "--out", tmp_path / "other", code=2)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--requantize",), "There is no F8 format to write the output in"),
        (("--requantize", "--coefficient", "0.2,0.4"), "Several outputs in F8"),
        (("--requantize", "--out-dtype", "F32"), "both in F8 and in another dtype"),
        (("--requantize", "--rounding", "stochastic"), "F8 weights are rounded to nearest"),
        (("--rank", "2"), "on these models is no adapter"),
        (("--rank", "2", "--energy", "0.5"), "give one of --rank and --energy"),
        (("--rank", "2", "--requantize"), "A lower rank is for adapters"),
        (("--vocabulary", "onion"), "union"),
        (("--rounding", "up"), "nearest, stochastic"),
        (("--energy", "1.5"), "'energy' is out of range"),
        (("--coefficient", "auto", "--no-utility", "--requantize"), "'--requantize' has no meaning"),
        (("--coefficient", "auto", "--no-utility", "--vocabulary", "base"), "'--vocabulary' has no meaning"),
        (("--coefficient", "auto", "--no-utility", "--set", "weight=1"), "'--set' has no meaning"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    pair: dict[str, Path], tmp_path: Path, words: tuple[str, ...], text: str
) -> None:
    told = repair("linear", *flags(pair), *words, "--out", tmp_path / "out", code=2)
    assert text in told
    assert "fix:" in told
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    "words", [("--vocabulary", "base"), ("--pad-to-multiple-of", "8"), ("--rank", "2"), ("--base", "x")]
)
def test_a_recipe_is_not_given_what_it_says_itself(
    pair: dict[str, Path], tmp_path: Path, words: tuple[str, str]
) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe_of(pair, ""))
    told = repair(tmp_path / "recipe.yaml", *words, "--out", tmp_path / "out", code=2)
    assert f"'{words[0]}' has no meaning with a recipe" in told


def test_a_method_without_a_tuned_model_says_so(pair: dict[str, Path], tmp_path: Path) -> None:
    told = repair("linear", "--aligned", pair["aligned"], "--out", tmp_path / "out", code=2)
    assert "'linear' needs a tuned model" in told


def test_methods_that_learn_keep_the_tokens_of_their_models(grown: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "answer": "b"}) + "\n")
    words = ["safe_delta", *flags(grown[0]), "--vocabulary", "union", "--safety-rows", tmp_path / "rows.jsonl"]
    assert "cannot be given other tokens" in repair(*words, "--out", tmp_path / "out", code=2)


def test_explain_says_whose_rows_are_filled_in(grown: Any, tmp_path: Path) -> None:
    rows = repair("linear", *flags(grown[0]), "--vocabulary", "union", "--explain")["plan"]
    assert any(name == "note" and "'aligned' lacks 1 tokens" in text for name, text in rows)
    assert not (tmp_path / "out").exists()


def test_outputs_of_a_sweep_are_what_each_alone_would_be(pair: dict[str, Path], tmp_path: Path) -> None:
    words = ["slerp", *flags(pair), "--rounding", "stochastic", "--seed", 3]
    repair(*words, "--coefficient", "0.2,0.7", "--workers", 2, "--out", tmp_path / "all")
    for value in ("0.2", "0.7"):
        repair(*words, "--coefficient", value, "--out", tmp_path / value)
        one, other = tmp_path / value, tmp_path / "all" / f"coefficient-{value}"
        assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
        assert lock(one)["facts"] == lock(other)["facts"]
        assert lock(one)["rounding"] == lock(other)["rounding"]


def test_the_plan_counts_tensors_and_names_the_rounding(pair: dict[str, Path], tmp_path: Path) -> None:
    rows = repair("linear", *flags(pair), "--explain")["plan"]
    assert dict(rows)["model.layers.*.mlp.up_proj.weight"].endswith("reads aligned, tuned; 2 tensors")
    words = ["repair", "linear", *flags(pair), "--rounding", "stochastic", "--seed", 4, "--out", tmp_path / "out"]
    done = RUN.invoke(app, [*map(str, words)])
    assert done.exit_code == 0
    assert "stochastic, seed 4" in done.stderr
