# SPDX-License-Identifier: Apache-2.0
"""A repair of each architecture, written, loaded by transformers or PEFT, and compared with the trial in memory."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from keelwright.models.loading import load
from keelwright.models.refs import parse_ref, resolve
from keelwright.models.sources import open_source
from keelwright.repair.linear import Linear, LinearConfig
from keelwright.repair.materialise import repair
from keelwright.repair.resta import Resta, RestaConfig
from keelwright.weights.live import LiveTrial
from keelwright.weights.lock import verify

SIZES = {
    "vocab_size": 32,
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
ARCHITECTURES = {
    "llama": (LlamaConfig, {}),
    "qwen3": (Qwen3Config, {"head_dim": 8}),
    "gemma2": (Gemma2Config, {"head_dim": 8}),
    "gemma3": (Gemma3TextConfig, {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    "mistral": (MistralConfig, {}),
    "phi3": (Phi3Config, {}),
}
LINEAR = Linear(LinearConfig(0.3))


def build(architecture: str, *, tied: bool, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
    kind, settings = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        kind(**SIZES, **settings, tie_word_embeddings=tied), dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def moved(model: PreTrainedModel, *, seed: int, size: float = 0.02) -> PreTrainedModel:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((size * torch.randn(parameter.shape)).to(parameter.dtype))
    return model


def save(model: PreTrainedModel, folder: Path, *, shard: str | None = None) -> Path:
    model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<bos>", "<end>", "<unk>", "a", "b"])}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>", unk_token="<unk>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def pair(tmp_path: Path, architecture: str, *, tied: bool, dtype: torch.dtype, sharded: bool) -> tuple[Path, Path]:
    model = build(architecture, tied=tied, dtype=dtype)
    aligned = save(model, tmp_path / "aligned", shard="20KB" if sharded else None)
    # The two are cut at different places: byte ranges must not care.
    tuned = save(moved(model, seed=1), tmp_path / "tuned", shard="33KB" if sharded else None)
    assert sharded == (aligned / "model.safetensors.index.json").is_file()
    return aligned, tuned


def add_lora(base: Path, folder: Path, *, seed: int, rank: int = 4, **settings: object) -> Path:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.05)
    adapted.save_pretrained(folder)
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.arange(3, 31).view(2, 14)
    with torch.inference_mode():
        return model.eval()(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits


def trial_logits(edit: object, refs: dict[str, str | Path]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tuned model's own logits, and those of the trial in memory."""
    sources = {role: open_source(resolve(parse_ref(ref), offline=True)) for role, ref in refs.items()}
    tuned = load(refs["tuned"], offline=True)
    before = logits(tuned.module)
    with LiveTrial(tuned.module, sources) as live:
        change = live.apply(edit)
        assert 0 < change.relative_norm < 0.5
        tried = logits(tuned.module)
    assert torch.equal(logits(tuned.module), before)
    return before, tried


@pytest.mark.parametrize("sharded", [False, True], ids=["one-file", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_written_model_equals_the_live_trial(
    tmp_path: Path, architecture: str, tied: bool, dtype: torch.dtype, sharded: bool
) -> None:
    aligned, tuned = pair(tmp_path, architecture, tied=tied, dtype=dtype, sharded=sharded)
    out = tmp_path / "out"
    result = repair(
        "linear", aligned=aligned, tuned=tuned, coefficient=0.3, out=out, max_shard_bytes=25_000 if sharded else None
    )
    assert result["form"] == "full"
    assert sharded == (out / "model.safetensors.index.json").is_file()
    written = AutoModelForCausalLM.from_pretrained(out)
    assert written.dtype is dtype
    before, tried = trial_logits(LINEAR, {"aligned": aligned, "tuned": tuned})
    assert torch.equal(logits(written), tried)
    assert not torch.equal(tried, before)
    assert verify(out)["files"] == len(result["files"])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_resta_written_equals_the_live_trial(tmp_path: Path, architecture: str) -> None:
    aligned, tuned = pair(tmp_path, architecture, tied=False, dtype=torch.bfloat16, sharded=False)
    unaligned = save(moved(AutoModelForCausalLM.from_pretrained(aligned), seed=2), tmp_path / "unaligned", shard="40KB")
    refs = {"aligned": aligned, "unaligned": unaligned, "tuned": tuned}
    repair("resta", **refs, coefficient=0.7, out=tmp_path / "out")
    _, tried = trial_logits(Resta(RestaConfig(0.7)), refs)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), tried)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_lora_tuned_model_written_in_full_equals_the_live_trial(
    tmp_path: Path, architecture: str, dtype: torch.dtype
) -> None:
    base = save(build(architecture, tied=True, dtype=dtype), tmp_path / "base")
    tuned = f"{base}+{add_lora(base, tmp_path / 'lora', seed=1)}"
    result = repair("linear", aligned=base, tuned=tuned, coefficient=0.3, out=tmp_path / "out", output_form="full")
    assert result["form"] == "full"
    _, tried = trial_logits(LINEAR, {"aligned": base, "tuned": tuned})
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), tried)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_adapter_comes_out_as_an_adapter_close_to_the_live_trial(tmp_path: Path, architecture: str) -> None:
    base = save(build(architecture, tied=True, dtype=torch.float32), tmp_path / "base")
    tuned = f"{base}+{add_lora(base, tmp_path / 'lora', seed=1, use_rslora=architecture == 'mistral')}"
    result = repair("linear", aligned=base, tuned=tuned, coefficient=0.3, out=tmp_path / "out")
    assert result["form"] == "adapter"
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == 4
    before, tried = trial_logits(LINEAR, {"aligned": base, "tuned": tuned})
    written = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    # PEFT adds B(Ax) to Wx, the trial multiplies by W + BA: the same sum, rounded in another order (float32, 2 layers).
    torch.testing.assert_close(logits(written), tried, rtol=1e-4, atol=2e-5)
    assert (tried - before).abs().max() > 1e-2
    verify(tmp_path / "out")
    # The output is a model reference like any other.
    torch.testing.assert_close(logits(load(f"{base}+{tmp_path / 'out'}").module), tried, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_resta_of_two_adapters_is_an_adapter_of_the_summed_rank(tmp_path: Path, architecture: str) -> None:
    base = save(build(architecture, tied=False, dtype=torch.float32), tmp_path / "base")
    refs = {
        "aligned": base,
        "unaligned": f"{base}+{add_lora(base, tmp_path / 'bad', seed=2, rank=3)}",
        "tuned": f"{base}+{add_lora(base, tmp_path / 'lora', seed=1)}",
    }
    result = repair("resta", **refs, coefficient=0.5, out=tmp_path / "out")
    assert result["form"] == "adapter"
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 7
    _, tried = trial_logits(Resta(RestaConfig(0.5)), refs)
    written = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    torch.testing.assert_close(logits(written), tried, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("tying", ["aligned", "tuned"])
def test_a_tied_and_an_untied_model_give_an_untied_one(tmp_path: Path, tying: str) -> None:
    tied = build("llama", tied=True, dtype=torch.float32)
    untied = build("llama", tied=False, dtype=torch.float32)
    untied.load_state_dict(tied.state_dict())
    moved(untied, seed=3)
    folders = {"tied": save(tied, tmp_path / "one"), "untied": save(untied, tmp_path / "two")}
    roles = {role: folders["tied" if role == tying else "untied"] for role in ("aligned", "tuned")}
    repair("linear", **roles, coefficient=0.5, out=tmp_path / "out")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert written.config.tie_word_embeddings is False
    with torch.no_grad():
        for name, parameter in untied.named_parameters():
            parameter.copy_(0.5 * parameter + 0.5 * tied.state_dict()[name])
    assert torch.equal(written.lm_head.weight, untied.lm_head.weight)
    torch.testing.assert_close(logits(written), logits(untied))
