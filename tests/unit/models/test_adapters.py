# SPDX-License-Identifier: Apache-2.0
"""Adapters: what is added lazily equals what PEFT merges; kinds that differ are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from keelwright.core.errors import ConfigError, DataError, MissingError, ModelMismatchError, UnsafeInputError
from keelwright.models.adapters import (
    AdaptedCheckpoint,
    LoraAdapter,
    LoraFactors,
    factors_from_state,
    read_adapter,
    split_key,
)
from keelwright.models.checkpoint import Checkpoint

MakeFolder = Callable[..., Path]
MakeModel = Callable[..., PreTrainedModel]

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": LINEAR},
    "rank-stabilised": {"target_modules": LINEAR, "use_rslora": True},
    "rank_pattern": {
        "target_modules": LINEAR,
        "rank_pattern": {"q_proj": 3, "layers.1.mlp.down_proj": 6},
        "alpha_pattern": {"q_proj": 11, "model.layers.0.self_attn.v_proj": 5},
    },
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["lm_head"]},
}


def trained(model: PreTrainedModel, folder: Path, seed: int = 1, **settings: Any) -> PeftModel:
    """Return the model with a random adapter that is far from its start, saved to the folder."""
    wrapped = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 7, "task_type": "CAUSAL_LM", **settings}))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    wrapped.save_pretrained(folder)
    return wrapped


def whole(source: AdaptedCheckpoint | Checkpoint, name: str) -> torch.Tensor:
    entry = source.entries()[name]
    return source.read(name, 0, entry.elements).view(entry.shape)


def edit_settings(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def adapter(make_folder: MakeFolder, tmp_path: Path) -> tuple[Path, Path]:
    base = make_folder("llama")
    trained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter", target_modules=LINEAR)
    return base, tmp_path / "adapter"


@pytest.mark.parametrize("kind", KINDS)
def test_the_sum_equals_what_peft_merges(make_folder: MakeFolder, tmp_path: Path, kind: str) -> None:
    base = make_folder("llama")
    wrapped = trained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter", **KINDS[kind])
    merged = wrapped.merge_and_unload().state_dict()
    plain = Checkpoint(base)
    source = AdaptedCheckpoint(plain, adapters=[read_adapter(tmp_path / "adapter")])
    changed = {name for name in plain.entries() if not torch.equal(merged[name], whole(plain, name))}
    assert changed
    assert changed == source.touched()
    for name in source.entries():
        torch.testing.assert_close(whole(source, name), merged[name], rtol=0, atol=1e-6)


def test_a_transposed_layer_equals_what_peft_merges(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30, n_positions=16, bos_token_id=1, eos_token_id=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    wrapped = trained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        tmp_path / "adapter",
        # The second is square, so that only the setting can tell the layout.
        target_modules=["c_attn", "attn.c_proj"],
        fan_in_fan_out=True,
    )
    merged = wrapped.merge_and_unload().state_dict()
    source = AdaptedCheckpoint(Checkpoint(tmp_path / "base"), adapters=[read_adapter(tmp_path / "adapter")])
    assert source.touched() == {"transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_proj.weight"}
    for name in source.touched():
        torch.testing.assert_close(whole(source, name), merged[name], rtol=0, atol=1e-6)


def test_adapters_of_a_half_precision_base_are_added_in_float32(make_folder: MakeFolder, tmp_path: Path) -> None:
    base = make_folder("llama", dtype=torch.bfloat16)
    trained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter", target_modules=["q_proj"])
    plain, lora = Checkpoint(base), read_adapter(tmp_path / "adapter")
    source = AdaptedCheckpoint(plain, adapters=[lora])
    name = "model.layers.0.self_attn.q_proj.weight"
    assert whole(source, name).dtype == torch.float32
    torch.testing.assert_close(whole(source, name), whole(plain, name).float() + lora.factors[name].delta())
    other = "model.layers.0.self_attn.k_proj.weight"
    assert torch.equal(whole(source, other), whole(plain, other))
    assert whole(source, other).dtype == torch.bfloat16
    assert source.entries() == plain.entries()


def test_bits_do_not_depend_on_the_range_that_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("keelwright.models.adapter_changes.BLOCK_ELEMENTS", 3 * 41)
    torch.manual_seed(0)
    (tmp_path / "config.json").write_text("{}")
    save_file({"w": torch.randn(17, 41)}, tmp_path / "model.safetensors")
    factors = {"w": LoraFactors(torch.randn(17, 5), torch.randn(5, 41), 0.7)}
    source = AdaptedCheckpoint(Checkpoint(tmp_path), factors=factors)
    everything = source.read("w", 0, 17 * 41)
    for step in (1, 7, 41, 100, 123, 500):
        parts = [source.read("w", start, min(start + step, 17 * 41)) for start in range(0, 17 * 41, step)]
        assert torch.equal(torch.cat(parts), everything)


def test_several_adapters_add_up(make_folder: MakeFolder, tmp_path: Path) -> None:
    base = make_folder("llama")
    for seed in (1, 2):
        trained(AutoModelForCausalLM.from_pretrained(base), tmp_path / f"a{seed}", seed, target_modules=["q_proj"])
    one, two = read_adapter(tmp_path / "a1", "one"), read_adapter(tmp_path / "a2", "two")
    plain = Checkpoint(base, "the base")
    source = AdaptedCheckpoint(plain, adapters=[one, two])
    name = "model.layers.1.self_attn.q_proj.weight"
    wanted = whole(plain, name) + one.factors[name].delta() + two.factors[name].delta()
    torch.testing.assert_close(whole(source, name), wanted)
    assert source.describe() == "the base+one+two"


def test_factors_in_memory_equal_the_saved_ones(make_folder: MakeFolder, tmp_path: Path) -> None:
    base = make_folder("llama")
    wrapped = trained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter", target_modules=LINEAR, use_rslora=True
    )
    config = wrapped.peft_config["default"].to_dict()
    config["peft_type"] = config["peft_type"].value if hasattr(config["peft_type"], "value") else config["peft_type"]
    factors = factors_from_state(get_peft_model_state_dict(wrapped), config)
    saved = read_adapter(tmp_path / "adapter")
    assert factors.keys() == saved.factors.keys()
    for name, one in factors.items():
        assert torch.equal(one.delta(), saved.factors[name].delta())
    source = AdaptedCheckpoint(Checkpoint(base), factors=factors)
    assert source.touched() == frozenset(factors)


def test_factors_in_memory_with_full_tensors_are_refused(make_folder: MakeFolder, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"trains 'lm_head.weight' in full"):
        factors_from_state({"base_model.model.lm_head.weight": torch.ones(1)}, {"peft_type": "LORA"})


@pytest.mark.parametrize(
    ("key", "name", "part"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "model.layers.0.self_attn.q_proj", "A"),
        ("base_model.model.model.layers.0.mlp.up_proj.lora_B.default.weight", "model.layers.0.mlp.up_proj", "B"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "model.embed_tokens", "embedding_A"),
        ("base_model.model.lm_head.weight", "lm_head.weight", None),
        ("base_model.model.lm_head.modules_to_save.default.weight", "lm_head.weight", None),
        (
            "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias",
            "model.layers.0.self_attn.q_proj.bias",
            None,
        ),
    ],
)
def test_keys_of_peft_lead_to_names_in_the_base(key: str, name: str, part: str | None) -> None:
    assert split_key(key) == (name, part)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"peft_type": "BOFT"}, "peft_type BOFT"),
        ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING: it changes the prompt"),
        ({"peft_type": "XLORA"}, "XLORA: it mixes adapters for each input"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication: it makes a deeper model"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens: it is on for a part of each prompt"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config"),
        ({"kasa_config": {"beta": 1}}, "kasa_config"),
        ({"use_qalora": True}, "use_qalora"),
    ],
)
def test_other_kinds_are_refused_by_name(adapter: tuple[Path, Path], changes: dict[str, Any], named: str) -> None:
    edit_settings(adapter[1], **changes)
    with pytest.raises(ConfigError) as caught:
        read_adapter(adapter[1], "my adapter")
    assert caught.value.problem == "The adapter 'my adapter' is of a kind that keelwright does not add yet."
    assert named in str(caught.value.found)
    assert "merge it with PEFT" in str(caught.value.fix)


@pytest.mark.parametrize("start", ["pissa_niter_4", "pissa", "olora", "corda", "loftq", "lora_ga"])
def test_starts_that_change_the_base_are_refused_with_the_way_to_convert_them(
    adapter: tuple[Path, Path], start: str
) -> None:
    edit_settings(adapter[1], init_lora_weights=start)
    with pytest.raises(ConfigError) as caught:
        read_adapter(adapter[1], "my adapter")
    assert f"started with '{start}'" in str(caught.value.found)
    assert "path_initial_model_for_weight_conversion" in str(caught.value.fix)


def test_an_adapter_of_another_model_is_refused(adapter: tuple[Path, Path], make_folder: MakeFolder) -> None:
    wider = Checkpoint(make_folder("llama", name="wider", hidden_size=64), "wider")
    with pytest.raises(ModelMismatchError, match=r"does not fit 'wider' at 'model\.layers") as caught:
        AdaptedCheckpoint(wider, adapters=[read_adapter(adapter[1], "mine")])
    assert "shape [" in str(caught.value.expected)
    shallow = Checkpoint(make_folder("llama", name="shallow", num_hidden_layers=1), "shallow")
    with pytest.raises(ModelMismatchError, match="'mine' was not made for 'shallow'") as caught:
        AdaptedCheckpoint(shallow, adapters=[read_adapter(adapter[1], "mine")])
    assert "model.layers.1" in str(caught.value.found)
    assert "adapter_config.json names" in str(caught.value.fix)


def test_half_a_pair_is_refused(adapter: tuple[Path, Path]) -> None:
    path = adapter[1] / "adapter_model.safetensors"
    tensors = load_file(path)
    gone = next(key for key in tensors if "lora_B" in key)
    save_file({key: value for key, value in tensors.items() if key != gone}, path)
    with pytest.raises(DataError, match=r"has half a pair for 'model\.layers"):
        read_adapter(adapter[1])


def test_settings_that_do_not_fit_the_factors_are_refused(adapter: tuple[Path, Path]) -> None:
    edit_settings(adapter[1], r=9)
    with pytest.raises(DataError, match="do not fit its settings") as caught:
        read_adapter(adapter[1])
    assert "A [9, columns]" in str(caught.value.expected)


def test_an_adapter_without_tensors_is_refused(adapter: tuple[Path, Path]) -> None:
    save_file({}, adapter[1] / "adapter_model.safetensors")
    with pytest.raises(DataError, match="is empty"):
        read_adapter(adapter[1])


def test_a_quantised_adapter_is_refused(adapter: tuple[Path, Path]) -> None:
    path = adapter[1] / "adapter_model.safetensors"
    save_file({key: value.to(torch.int8) for key, value in load_file(path).items()}, path)
    with pytest.raises(DataError, match="not stored as plain floating-point numbers"):
        read_adapter(adapter[1])


def test_a_full_model_in_the_place_of_an_adapter_is_told(make_folder: MakeFolder) -> None:
    with pytest.raises(ConfigError, match="'words' is a full model, not an adapter") as caught:
        read_adapter(make_folder("llama"), "words")
    assert caught.value.fix == "pass it on its own: words"


def test_a_pickled_adapter_is_refused(adapter: tuple[Path, Path]) -> None:
    (adapter[1] / "adapter_model.safetensors").rename(adapter[1] / "adapter_model.bin")
    with pytest.raises(UnsafeInputError, match="are pickled"):
        read_adapter(adapter[1])


def test_a_missing_folder_is_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="There is no such folder"):
        read_adapter(tmp_path / "none")


def test_the_digest_follows_values_and_scale(adapter: tuple[Path, Path]) -> None:
    base, folder = adapter
    one = read_adapter(folder)
    assert one.data_digest() == read_adapter(folder, "other words").data_digest()
    edit_settings(folder, lora_alpha=8)
    assert one.data_digest() != read_adapter(folder).data_digest()
    plain = Checkpoint(base)
    assert AdaptedCheckpoint(plain, adapters=[one]).data_digest() != plain.data_digest()
    assert LoraAdapter("", one.factors, {"full": torch.ones(2)}).data_digest() != one.data_digest()
