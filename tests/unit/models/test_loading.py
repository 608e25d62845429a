# SPDX-License-Identifier: Apache-2.0
"""Loading: stored dtype, merged adapters, and an error for all that does not fit."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from keelwright.core.errors import ConfigError, DataError, ModelMismatchError, ResourceError, UnsafeInputError
from keelwright.models import loading
from keelwright.models.loading import LoadedModel, find_device, load
from keelwright.models.refs import parse_ref
from keelwright.models.sources import open_source

MakeFolder = Callable[..., Path]
ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "phi3"]
IDS = torch.tensor([[4, 7, 9, 12, 5]])


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def adapter_for(base: Path, folder: Path, seed: int = 1) -> Path:
    wrapped = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=3, lora_alpha=8, target_modules=["q_proj", "down_proj"]),
    )
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    wrapped.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_loaded_model_computes_what_transformers_loads(
    make_folder: MakeFolder, architecture: str, dtype: torch.dtype
) -> None:
    folder = make_folder(architecture, dtype=dtype, shard="20KB")
    model = load(str(folder))
    assert model.module.dtype == dtype
    assert not model.module.training
    assert model.name == str(folder)
    assert model.revision == open_source(parse_ref(folder)).data_digest()
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(model.module(IDS).logits, theirs(IDS).logits)


def test_another_dtype_can_be_asked_for(make_folder: MakeFolder) -> None:
    assert load(make_folder("llama", dtype=torch.bfloat16), dtype=torch.float32).module.dtype == torch.float32


def test_the_tokenizer_keeps_its_rules_in_every_architecture(make_folder: MakeFolder) -> None:
    for architecture in ARCHITECTURES:
        tokenizer = load(make_folder(architecture)).tokenizer
        ids = tokenizer("the cat sees")["input_ids"]
        assert tokenizer.decode(ids) == "the cat sees", architecture
        assert tokenizer.chat_template


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_merged_as_the_lazy_source_says(
    make_folder: MakeFolder, tmp_path: Path, dtype: torch.dtype
) -> None:
    base = make_folder("llama", dtype=dtype)
    adapter = adapter_for(base, tmp_path / "lora")
    model = load(f"{base}+{adapter}")
    source = open_source(parse_ref(f"{base}+{adapter}"))
    for name, parameter in model.module.named_parameters():
        values = source.read(name, 0, parameter.numel()).to(dtype)
        assert torch.equal(parameter.flatten(), values), name
    assert model.revision == source.data_digest()
    assert model.revision != load(base).revision


def test_adapters_side_by_side_compute_the_same_as_merged(make_folder: MakeFolder, tmp_path: Path) -> None:
    base = make_folder("llama")
    adapters = [adapter_for(base, tmp_path / f"lora{seed}", seed) for seed in (1, 2)]
    text = "+".join(str(one) for one in (base, *adapters))
    merged, beside = load(text), load(text, merge_adapters=False)
    assert isinstance(beside.module, PeftModel)
    with torch.no_grad():
        torch.testing.assert_close(beside.module(IDS).logits, merged.module(IDS).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(load(base).module(IDS).logits, merged.module(IDS).logits, atol=0.1)


def test_a_live_model_is_returned_as_it_is(
    make_model: Callable[..., PreTrainedModel], make_tokenizer: Callable[..., PreTrainedTokenizerFast]
) -> None:
    loaded = LoadedModel(make_model(), make_tokenizer(), "mine", "r1")
    assert load(parse_ref(loaded)) is loaded


def test_weights_that_lack_a_tensor_are_refused(make_folder: MakeFolder) -> None:
    folder = make_folder("llama")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    tensors["extra.weight"] = torch.ones(2)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelMismatchError) as caught:
        load(folder)
    assert f"The weights of '{folder}' do not fit its config.json." == caught.value.problem
    assert "1 missing: model.norm.weight" in str(caught.value.found)
    assert "1 unexpected: extra.weight" in str(caught.value.found)
    assert caught.value.expected == "the tensors of LlamaForCausalLM"


def test_weights_of_another_shape_are_refused(make_folder: MakeFolder) -> None:
    folder = make_folder("llama")
    edit_config(folder, vocab_size=40)
    with pytest.raises(ModelMismatchError, match=r"2 of another shape: lm_head\.weight"):
        load(folder)


def test_remote_code_is_refused(make_folder: MakeFolder) -> None:
    folder = make_folder("llama")
    edit_config(folder, model_type="homemade", auto_map={"AutoModelForCausalLM": "modeling_homemade.Homemade"})
    (folder / "modeling_homemade.py").write_text("raise SystemExit('this must never run')")
    with pytest.raises(UnsafeInputError, match="needs code that comes with the model"):
        load(folder)


@pytest.mark.parametrize("kind", ["of-the-future", "clip_vision_model", None])
def test_what_is_no_language_model_is_refused(make_folder: MakeFolder, kind: str | None) -> None:
    folder = make_folder("llama")
    edit_config(folder, model_type=kind)
    with pytest.raises(DataError, match="is not a language model that transformers knows") as caught:
        load(folder)
    assert caught.value.found == f"model_type '{kind}'"


def test_settings_that_make_no_model_are_refused(make_folder: MakeFolder) -> None:
    folder = make_folder("llama")
    edit_config(folder, num_attention_heads=5)
    with pytest.raises(DataError, match=r"cannot build .* from its config\.json"):
        load(folder)


def test_a_model_without_a_tokenizer_is_refused(make_folder: MakeFolder) -> None:
    folder = make_folder("llama")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="has no tokenizer"):
        load(folder)


def test_a_broken_tokenizer_is_refused(make_folder: MakeFolder) -> None:
    folder = make_folder("llama")
    (folder / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(DataError, match=r"tokenizer of .* cannot be read"):
        load(folder)


def test_too_little_memory_is_told_before_loading(make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder("llama")
    monkeypatch.setattr("keelwright.models.memory.available_bytes", lambda device="cpu": 1000)
    monkeypatch.setattr(loading, "_from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(ResourceError) as caught:
        load(folder)
    assert caught.value.found == "1.00 kB free"


def test_pickled_weights_open_only_with_the_flag(make_folder: MakeFolder) -> None:
    folder = make_folder("llama")
    wanted = load(folder).module.state_dict()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnsafeInputError, match="are pickled"):
        load(folder)
    model = load(folder, allow_pickle=True)
    assert all(torch.equal(value, wanted[name]) for name, value in model.module.state_dict().items())
    assert model.revision.startswith("files:pytorch_model.bin:")


class Exploit:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("exploited"),))


def test_even_with_the_flag_a_pickle_runs_no_code(
    make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = make_folder("llama")
    torch.save({"model.norm.weight": Exploit()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnsafeInputError, match="more than tensors"):
        load(folder, allow_pickle=True)
    assert not Path("exploited").exists()


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "nonsense", "meta"])
def test_a_device_that_is_not_here_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match=f"There is no device '{device}' here") as caught:
        find_device(device)
    assert "auto, cpu" in str(caught.value.expected)


def test_auto_finds_a_device() -> None:
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert find_device("cpu").type == "cpu"


def test_loading_is_quiet_and_leaves_the_settings_alone(
    make_folder: MakeFolder, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder("llama")
    capfd.readouterr()
    before = transformers.logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(folder)
    assert capfd.readouterr() == ("", "")
    assert transformers.logging.get_verbosity() == before
    assert before != logging.CRITICAL
