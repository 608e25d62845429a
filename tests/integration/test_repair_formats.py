# SPDX-License-Identifier: Apache-2.0
"""Repairs of models in 8-bit floats and of models with other vocabularies, written, and loaded by transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    FineGrainedFP8Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from keelwright.core.protocols import TensorSource
from keelwright.models.float8 import open_checkpoint, whole_state
from keelwright.models.refs import parse_ref
from keelwright.models.sources import open_source
from keelwright.repair.linear import Linear, LinearConfig
from keelwright.weights.plan import Plan, plan_edit
from keelwright.weights.requantise import fresh_scales, plan_requantised, to_float8
from keelwright.weights.stream import evaluate
from keelwright.weights.token_files import write_tokenizer
from keelwright.weights.vocabulary import fit_vocabularies
from keelwright.weights.write import materialise

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WORDS = ["<pad>", "<bos>", "<end>", "<unk>", "the", "cat", "sees", "a", "dog", "today"]
BLOCK = 16
# On a GPU transformers would keep F8 as it is.
DEQUANTISED = FineGrainedFP8Config(dequantize=True)
EDIT = Linear(LinearConfig(0.3))


def build(rows: int, *, seed: int, kind: type = LlamaConfig, tied: bool = False) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        kind(**SIZES, vocab_size=rows, tie_word_embeddings=tied), dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(torch.bfloat16).eval()


def save(model: torch.nn.Module, folder: Path, *, words: list[str] = WORDS, added: tuple[str, ...] = ()) -> Path:
    model.save_pretrained(folder)
    core = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(added)})
    tokenizer.save_pretrained(folder)
    return folder


def quantise(folder: Path) -> Path:
    """Store the layers' matrices of a checkpoint in F8, as fine-grained F8 does."""
    stored = {}
    for name, values in load_file(folder / "model.safetensors").items():
        stored[name] = values
        if not name.endswith("proj.weight"):
            continue
        rows, columns = values.shape
        blocks = values.float().view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        scales = fresh_scales(blocks.abs().amax((1, 3)), "F8_E4M3", "F32")
        wide = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        stored[name] = to_float8(values.float(), wide, torch.float8_e4m3fn, name=name, offset=0)
        stored[f"{name}_scale_inv"] = scales
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits


def tokens_below(count: int) -> torch.Tensor:
    return torch.arange(count).repeat(2)[: 2 * (count // 2)].view(2, -1)


def virtual(plan: Plan, config: Mapping[str, object], kind: type = LlamaConfig) -> torch.nn.Module:
    """Return a module that is filled by evaluating the plan; nothing is read from the output."""
    names = {**config, **plan.config_changes}
    model = AutoModelForCausalLM.from_config(
        kind(**{key: value for key, value in names.items() if value is not None}),
        attn_implementation="eager",
        dtype=torch.bfloat16,
    )
    state = {
        one.entry.name: torch.cat([part for _, part in evaluate(plan.edit, plan.sources, one.entry)]).view(
            one.entry.shape
        )
        for one in plan.tensors
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval()


def open_folder(folder: Path) -> TensorSource:
    return open_source(parse_ref(str(folder)))


def load_strictly(folder: Path, **settings: object) -> torch.nn.Module:
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True, attn_implementation="eager", **settings
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, Path]:
    """An aligned model, and a tuned one that is stored in F8."""
    return {
        "aligned": save(build(32, seed=0), tmp_path / "aligned"),
        "tuned": quantise(save(build(32, seed=1), tmp_path / "tuned")),
    }


def test_an_f8_checkpoint_is_read_as_transformers_reads_it(pair: dict[str, Path]) -> None:
    theirs = load_strictly(pair["tuned"], quantization_config=DEQUANTISED).state_dict()
    for name, values in whole_state(open_folder(pair["tuned"]), torch.bfloat16).items():
        assert torch.equal(values, theirs[name]), name


def test_a_repair_of_an_f8_model_loads_in_bfloat16(pair: dict[str, Path], tmp_path: Path) -> None:
    sources = {role: open_folder(folder) for role, folder in pair.items()}
    plan = plan_edit(EDIT, sources)
    out = tmp_path / "out"
    materialise(plan, out, companions_from=pair["tuned"])
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    tokens = tokens_below(32)
    wanted = logits(virtual(plan, {**SIZES, "vocab_size": 32, "tie_word_embeddings": False}), tokens)
    assert torch.equal(logits(load_strictly(out), tokens), wanted)
    assert not torch.equal(wanted, logits(load_strictly(pair["aligned"]), tokens))


def test_a_repair_written_in_f8_loads_and_is_close_to_the_repair(pair: dict[str, Path], tmp_path: Path) -> None:
    sources = {role: open_folder(folder) for role, folder in pair.items()}
    plain, out = tmp_path / "plain", tmp_path / "out"
    materialise(plan_edit(EDIT, sources), plain, companions_from=pair["tuned"])
    materialise(plan_requantised(EDIT, sources, out=out), out, companions_from=pair["tuned"])
    found, exact = open_checkpoint(out), open_checkpoint(plain)
    assert found.entries() == exact.entries()
    for name, entry in found.entries().items():
        one, two = (source.read(name, 0, entry.elements).float() for source in (exact, found))
        # Half a step of E4M3, and of bfloat16 for the plain output.
        peak = float(one.abs().max())
        assert ((one - two).abs() <= one.abs() * (2.0**-4 + 2.0**-8) + peak * 2.0**-18).all(), name
    theirs = load_strictly(out, quantization_config=DEQUANTISED).state_dict()
    for name, values in whole_state(found, torch.bfloat16).items():
        assert torch.equal(values, theirs[name]), name


@pytest.mark.parametrize("policy", ["base", "union", "donor"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_with_one_more_token_is_merged_with_its_parent(tmp_path: Path, policy: str, *, tied: bool) -> None:
    count = len(WORDS)
    folders = {
        "aligned": save(build(count, seed=0, tied=tied), tmp_path / "aligned"),
        "tuned": save(build(count + 1, seed=1, tied=tied), tmp_path / "tuned", added=("<task>",)),
    }
    sources = {role: open_folder(folder) for role, folder in folders.items()}
    fitted = fit_vocabularies(sources, folders, policy=policy, layout_role="tuned", base_role="aligned")
    plan = plan_edit(EDIT, fitted.sources, config_changes=fitted.config_changes)
    out = tmp_path / "out"
    materialise(plan, out, companions_from=folders["tuned"], tokenizer_from=folders[fitted.tokenizer_role])
    rows = count if policy == "base" else count + 1
    loaded = load_strictly(out)
    assert loaded.config.vocab_size == rows == len(AutoTokenizer.from_pretrained(out))
    tokens = tokens_below(rows)
    config = {**SIZES, "vocab_size": count + 1, "tie_word_embeddings": tied}
    assert torch.equal(logits(loaded, tokens), logits(virtual(plan, config), tokens))
    if policy != "base":
        # Only the tuned model has the row: it is kept as it is.
        kept = open_folder(folders["tuned"]).read("model.embed_tokens.weight", count * 32, (count + 1) * 32)
        assert torch.equal(loaded.get_input_embeddings().weight[count], kept)


def test_padded_rows_keep_their_count_and_a_new_token_takes_one_of_them(tmp_path: Path) -> None:
    padded = len(WORDS) + 6
    folders = {
        "aligned": save(build(padded, seed=0, kind=Qwen2Config), tmp_path / "aligned"),
        "tuned": save(build(padded + 8, seed=1, kind=Qwen2Config), tmp_path / "tuned", added=("<task>",)),
    }
    sources = {role: open_folder(folder) for role, folder in folders.items()}
    fitted = fit_vocabularies(sources, folders, policy="union", layout_role="tuned", base_role="aligned")
    plan = plan_edit(EDIT, fitted.sources, config_changes=fitted.config_changes)
    out = tmp_path / "out"
    materialise(plan, out, companions_from=folders["tuned"], tokenizer_from=folders[fitted.tokenizer_role])
    loaded = load_strictly(out)
    assert loaded.config.vocab_size == padded
    assert AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("<task>") == len(WORDS)
    tokens = tokens_below(padded)
    config = {**SIZES, "vocab_size": padded + 8, "tie_word_embeddings": False}
    assert torch.equal(logits(loaded, tokens), logits(virtual(plan, config, Qwen2Config), tokens))


def test_a_union_of_added_tokens_is_a_tokenizer_that_transformers_reads(tmp_path: Path) -> None:
    count = len(WORDS)
    folders = {
        "aligned": save(build(count + 1, seed=0), tmp_path / "aligned", added=("<safe>",)),
        "tuned": save(build(count + 1, seed=1), tmp_path / "tuned", added=("<task>",)),
    }
    sources = {role: open_folder(folder) for role, folder in folders.items()}
    fitted = fit_vocabularies(sources, folders, policy="union", layout_role="tuned", base_role="aligned")
    made = write_tokenizer(folders[fitted.tokenizer_role], fitted.tokenizer_files, tmp_path / "tokenizer")
    plan = plan_edit(EDIT, fitted.sources, config_changes=fitted.config_changes)
    materialise(plan, tmp_path / "out", companions_from=folders["tuned"], tokenizer_from=made)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("the <task> cat <safe>", add_special_tokens=False)["input_ids"] == [4, count + 1, 5, count]
    assert load_strictly(tmp_path / "out").get_input_embeddings().weight.shape[0] == count + 2
