# SPDX-License-Identifier: Apache-2.0
"""A LoRA adapter from two checkpoints: PEFT loads it on the base, and it is as near to the tuned model as it says."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from keelwright.core.errors import ConfigError, ModelMismatchError, NumericalError, StorageError
from keelwright.core.protocols import Silent
from keelwright.models.adapters import AdaptedCheckpoint, read_adapter
from keelwright.models.checkpoint import Checkpoint
from keelwright.weights.extract import extract_lora
from keelwright.weights.lock import verify

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA = LlamaConfig(**SIZES, tie_word_embeddings=False)
QWEN = Qwen2Config(**SIZES, tie_word_embeddings=False)
TIED = Qwen2Config(**SIZES, tie_word_embeddings=True)
GPT2 = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30, n_positions=16, bos_token_id=1, eos_token_id=2)


def pair(
    folder: Path,
    config: PreTrainedConfig,
    *,
    rank: int | None = 3,
    only: tuple[str, ...] | None = None,
    without: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float32,
) -> tuple[Path, Path]:
    """Save a model and one whose matrices differ by so much rank (None: fully), and its vectors too."""
    random = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * draw(*parameter.shape))
        model.to(dtype).save_pretrained(folder / "base")
        for name, parameter in model.named_parameters():
            if (only and not any(word in name for word in only)) or any(word in name for word in without):
                continue
            low = parameter.ndim == 2 and rank is not None
            change = draw(parameter.shape[0], rank) @ draw(rank, parameter.shape[1]) if low else draw(*parameter.shape)
            parameter.add_(0.05 * change)
        model.save_pretrained(folder / "tuned")
    return folder / "base", folder / "tuned"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def loaded(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Return what PEFT makes of base and adapter; every warning about missing or unknown keys is an error."""
    model = AutoModelForCausalLM.from_pretrained(base)
    wrapped = PeftModel.from_pretrained(model, adapter)
    return wrapped.merge_and_unload().state_dict()


def extract(base: Path, tuned: Path, out: Path, **settings: object) -> dict:
    return extract_lora(Checkpoint(base), Checkpoint(tuned), out, **settings)


MATRICES = ("proj", "lm_head", "c_attn", "c_fc")


@pytest.mark.parametrize("config", [LLAMA, QWEN, TIED, GPT2], ids=["llama", "qwen", "tied", "gpt2"])
@pytest.mark.parametrize("asked", [{"rank": 3}, {"rank": 8}, {"energy": 1.0 - 1e-12}], ids=str)
def test_a_rank_that_covers_the_true_one_gives_the_tuned_model(
    tmp_path: Path, config: PreTrainedConfig, asked: dict
) -> None:
    base, tuned = pair(tmp_path, config)
    report = extract(base, tuned, tmp_path / "out", **asked)
    found, wanted, before = loaded(base, tmp_path / "out"), weights(tuned), weights(base)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
        assert "inv_freq" in name or "attn.bias" in name or not torch.equal(tensor, before[name])
    assert report["not_represented"] == []
    assert report["totals"]["relative_error"] < 1e-5


@pytest.mark.parametrize("config", [LLAMA, TIED, GPT2], ids=["llama", "tied", "gpt2"])
def test_our_own_reader_gives_the_same_model_as_peft(tmp_path: Path, config: PreTrainedConfig) -> None:
    base, tuned = pair(tmp_path, config, rank=None)
    extract(base, tuned, tmp_path / "out", rank=4)
    source = AdaptedCheckpoint(Checkpoint(base), adapters=[read_adapter(tmp_path / "out")])
    found = loaded(base, tmp_path / "out")
    for name, entry in source.entries().items():
        values = source.read(name, 0, entry.elements).view(entry.shape)
        torch.testing.assert_close(values, found[name], rtol=0, atol=1e-6)


def test_the_report_says_how_near_the_loaded_model_is(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, LLAMA, rank=None)
    report = extract(base, tuned, tmp_path / "out", rank=4)
    found, wanted, before = loaded(base, tmp_path / "out"), weights(tuned), weights(base)
    lost = total = 0.0
    for row in report["tensors"]:
        change = (wanted[row["name"]] - before[row["name"]]).double()
        error = (wanted[row["name"]] - found[row["name"]]).double()
        assert row["relative_error"] == pytest.approx(float(error.norm() / change.norm()), rel=1e-4)
        assert row["energy"] == pytest.approx(1.0 - row["relative_error"] ** 2, abs=1e-9)
        assert row["norm"] == pytest.approx(float(change.norm()), rel=1e-6)
        assert row["rank"] == 4
        values = torch.linalg.svdvals(change)
        assert row["relative_error"] == pytest.approx(float(values[4:].norm() / values.norm()), rel=1e-4)
        lost, total = lost + float(error.square().sum()), total + float(change.square().sum())
    assert report["totals"]["relative_error"] == pytest.approx((lost / total) ** 0.5, rel=1e-4)
    assert report["totals"]["matrices"] == len(report["tensors"]) == 15
    assert report["totals"]["parameters"] == sum(4 * sum(row["shape"]) for row in report["tensors"])


def test_more_rank_keeps_more(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, LLAMA, rank=None, only=MATRICES)
    kept = [
        extract(base, tuned, tmp_path / f"out{rank}", rank=rank)["totals"]["energy"] for rank in (1, 2, 4, 8, 16, 32)
    ]
    assert kept == sorted(kept)
    assert kept[0] < 0.5
    assert kept[-1] == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_energy_is_reached_in_every_matrix_by_the_fewest_ranks(tmp_path: Path, energy: float) -> None:
    base, tuned = pair(tmp_path, LLAMA, rank=None, only=MATRICES)
    report = extract(base, tuned, tmp_path / "out", energy=energy)
    before, after = weights(base), weights(tuned)
    for row in report["tensors"]:
        squares = torch.linalg.svdvals((after[row["name"]] - before[row["name"]]).double()).square()
        shares = squares.cumsum(0) / squares.sum()
        assert row["energy"] >= energy - 1e-6
        assert row["rank"] == int((shares < energy).sum()) + 1
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert len({row["rank"] for row in report["tensors"]}) > 1
    assert config["rank_pattern"]
    found = loaded(base, tmp_path / "out")
    for row in report["tensors"]:
        error = (found[row["name"]] - after[row["name"]]).norm() / (after[row["name"]] - before[row["name"]]).norm()
        assert float(error) == pytest.approx(row["relative_error"], rel=1e-3)


def test_matrices_that_are_large_for_the_rank_go_through_the_sketch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {**SIZES, "hidden_size": 160, "intermediate_size": 176, "num_key_value_heads": 4, "vocab_size": 170}
    base, tuned = pair(tmp_path, LlamaConfig(**sizes, tie_word_embeddings=False), only=MATRICES)

    def unused(*given: object, **settings: object) -> None:
        raise AssertionError("the exact way was taken")

    monkeypatch.setattr("keelwright.ops.lowrank.exact_lowrank", unused)
    reports = [extract(base, tuned, tmp_path / f"out{seed}", rank=3, seed=seed) for seed in (0, 1)]
    for seed in (0, 1):
        found = loaded(base, tmp_path / f"out{seed}")
        for name, tensor in weights(tuned).items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
    one, two = (load_file(tmp_path / f"out{seed}" / "adapter_model.safetensors") for seed in (0, 1))
    assert one.keys() == two.keys()
    assert reports[0]["totals"]["matrices"] == 15


def test_only_what_changed_is_in_the_adapter(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, QWEN, only=("layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"))
    report = extract(base, tuned, tmp_path / "out", rank=3)
    names = {row["name"] for row in report["tensors"]}
    assert names == {"model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"}
    assert report["saved_whole"] == ["model.layers.0.self_attn.q_proj.bias"]
    keys = set(load_file(tmp_path / "out" / "adapter_model.safetensors"))
    assert "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias" in keys
    assert len(keys) == 5
    for name, tensor in loaded(base, tmp_path / "out").items():
        torch.testing.assert_close(tensor, weights(tuned)[name], rtol=0, atol=1e-6)


def test_a_change_of_norms_and_biases_alone_makes_an_adapter_too(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, QWEN, only=("norm", "bias"))
    report = extract(base, tuned, tmp_path / "out", rank=3)
    assert report["tensors"] == []
    found = loaded(base, tmp_path / "out")
    for name, tensor in weights(tuned).items():
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize(
    ("config", "name", "is_usual"),
    [(TIED, "model.embed_tokens.weight", True), (GPT2, "transformer.wte.weight", False)],
    ids=["qwen", "gpt2"],
)
def test_a_tied_embedding_changes_in_both_places(
    tmp_path: Path, config: PreTrainedConfig, name: str, is_usual: bool
) -> None:
    base, tuned = pair(tmp_path, config, only=("embed_tokens", "wte"))
    extract(base, tuned, tmp_path / "out", rank=3)
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["ensure_weight_tying"] is is_usual
    found = loaded(base, tmp_path / "out")
    assert torch.equal(found["lm_head.weight"], weights(tuned)[name])
    assert torch.equal(found[name], weights(tuned)[name])


def test_a_change_that_no_adapter_holds_is_an_error_unless_it_is_accepted(tmp_path: Path) -> None:
    config = GptOssConfig(**{**SIZES, "head_dim": 8}, num_local_experts=2, num_experts_per_tok=1)
    base, tuned = pair(tmp_path, config, only=("q_proj", "experts.down_proj", "sinks"))
    with pytest.raises(ConfigError, match="cannot hold all that changed") as caught:
        extract(base, tuned, tmp_path / "out", rank=3)
    assert "down_proj" in str(caught.value.found)
    assert "--allow-partial" in str(caught.value.fix)
    assert not list(tmp_path.glob("out*"))
    report = extract(base, tuned, tmp_path / "out", rank=3, allow_partial=True)
    assert "model.layers.0.mlp.experts.down_proj" in report["not_represented"]
    assert "model.layers.0.self_attn.sinks" in report["not_represented"]
    found, wanted, before = loaded(base, tmp_path / "out"), weights(tuned), weights(base)
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-6)
    assert torch.equal(found[report["not_represented"][0]], before[report["not_represented"][0]])
    assert "changed but not represented" in (tmp_path / "out" / "README.md").read_text()


def test_an_adapter_of_another_kind_can_be_extracted_as_lora(tmp_path: Path) -> None:
    base, _ = pair(tmp_path, LLAMA)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], use_dora=True)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(tmp_path / "dora")
    wanted = model.merge_and_unload().state_dict()
    source = AdaptedCheckpoint(Checkpoint(base), adapters=[read_adapter(tmp_path / "dora")])
    report = extract_lora(Checkpoint(base), source, tmp_path / "out", energy=1.0)
    assert {row["name"].split(".")[-2] for row in report["tensors"]} == {"q_proj", "up_proj"}
    for name, tensor in loaded(base, tmp_path / "out").items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=2e-6)


def test_half_precision_is_widened_before_the_difference(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, LLAMA, dtype=torch.bfloat16, only=MATRICES)
    report = extract(base, tuned, tmp_path / "out", rank=32)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    row = next(row for row in report["tensors"] if "q_proj" in row["name"])
    before, after = (Checkpoint(one).read(row["name"], 0, 32 * 32).view(32, 32).float() for one in (base, tuned))
    stem = f"base_model.model.{row['name'].removesuffix('.weight')}"
    found = tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
    torch.testing.assert_close(found, after - before, rtol=0, atol=1e-6)


def test_the_same_inputs_give_the_same_bytes_and_verify(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, LLAMA, rank=None)
    for name in ("one", "two"):
        extract(base, tuned, tmp_path / name, rank=2)
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    assert verify(tmp_path / "one")["files"] == 3
    lock = json.loads((tmp_path / "one" / "merge.lock.json").read_text())
    assert lock["extraction"]["totals"]["largest_rank"] == 2
    assert set(lock["sources"]) == {"base", "tuned"}
    assert not (tmp_path / "one.partial").exists()


def test_the_plan_is_shown_before_the_work_and_the_loss_after_it(tmp_path: Path) -> None:
    told: list[tuple[str, object]] = []

    class Teller(Silent):
        def plan(self, title: str, rows: object) -> None:
            told.append(("plan", dict(rows)))

        def stage(self, title: str, total: int | None = None, unit: str = "") -> None:
            told.append(("stage", title))

        def note(self, text: str) -> None:
            told.append(("note", text))

    base, tuned = pair(tmp_path, QWEN)
    extract(base, tuned, tmp_path / "out", rank=2, progress=Teller())
    assert [kind for kind, _ in told] == ["stage", "plan", "stage", "note", "note"]
    assert told[1][1]["matrices"] == "15 changed"
    assert told[1][1]["saved whole"] == "6 tensors and 6 biases"
    assert "relative error" in str(told[3][1])


def test_names_and_tokenizer_are_as_asked(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, LLAMA)
    (tuned / "tokenizer.json").write_text("{}")
    extract(base, tuned, tmp_path / "out", rank=1, base_name="org/base", tokenizer_from=tuned)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_two_equal_models_leave_nothing_to_extract(tmp_path: Path) -> None:
    base, _ = pair(tmp_path, LLAMA)
    with pytest.raises(ModelMismatchError, match="hold the same weights"):
        extract(base, base, tmp_path / "out", rank=2)
    assert not list(tmp_path.glob("out*"))


def test_models_that_do_not_fit_are_refused_before_any_work(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, LLAMA)
    other, _ = pair(tmp_path / "tied", LlamaConfig(**SIZES, tie_word_embeddings=True))
    with pytest.raises(ModelMismatchError, match="do not have the same tensors") as caught:
        extract(base, other, tmp_path / "out", rank=2)
    assert "lm_head.weight" in str(caught.value.found)
    wide, _ = pair(tmp_path / "wide", LlamaConfig(**{**SIZES, "vocab_size": 44}, tie_word_embeddings=False))
    with pytest.raises(ModelMismatchError, match="differ in the layout of"):
        extract(base, wide, tmp_path / "out", rank=2)
    for target in ({}, {"rank": 2, "energy": 0.5}, {"rank": 0}, {"energy": 1.5}):
        with pytest.raises(ConfigError):
            extract(base, tuned, tmp_path / "out", **target)
    assert not list(tmp_path.glob("out*"))


def test_a_base_without_known_layers_is_refused(tmp_path: Path, memory, make_tensors) -> None:
    with pytest.raises(ConfigError, match="layers of 'in memory' are not known"):
        extract_lora(memory(make_tensors()), memory(make_tensors(1)), tmp_path / "out", rank=2)


def test_a_weight_that_is_no_number_is_named(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, LLAMA)
    path = tuned / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 3] = float("inf")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(NumericalError, match=r"'tuned' has a weight that is not a number.*up_proj.weight', element 3"):
        extract(base, tuned, tmp_path / "out", rank=2)
    assert not list(tmp_path.glob("out*"))


def test_a_disk_without_room_and_a_folder_in_use_are_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = pair(tmp_path, LLAMA)
    with pytest.raises(StorageError, match="is not empty"):
        extract(base, tuned, base, rank=2)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 99, 1))
    with pytest.raises(StorageError, match="has too little room"):
        extract(base, tuned, tmp_path / "out", rank=2)
    assert not list(tmp_path.glob("out*"))
