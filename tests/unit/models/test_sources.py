# SPDX-License-Identifier: Apache-2.0
"""Sources: the right reader for each form of model, and the first number that is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from keelwright.core.errors import ConfigError, ModelMismatchError
from keelwright.models import sources
from keelwright.models.adapters import AdaptedCheckpoint
from keelwright.models.checkpoint import Checkpoint
from keelwright.models.refs import parse_ref, resolve
from keelwright.models.sources import first_nonfinite, open_source, stored_dtype

MakeFolder = Callable[..., Path]


def adapter_for(base: Path, folder: Path, *targets: str) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(r=2, target_modules=list(targets))).save_pretrained(folder)
    return folder


def test_a_folder_opens_as_a_checkpoint_and_with_an_adapter_as_a_sum(make_folder: MakeFolder, tmp_path: Path) -> None:
    base = make_folder("llama")
    assert isinstance(open_source(parse_ref(base)), Checkpoint)
    adapter = adapter_for(base, tmp_path / "lora", "q_proj")
    source = open_source(resolve(parse_ref(f"{base}+{adapter}"), offline=True))
    assert isinstance(source, AdaptedCheckpoint)
    assert source.describe() == f"{base}+{adapter}"
    assert source.base.describe() == str(base)
    assert source.config_json()["model_type"] == "llama"


def test_adapter_and_model_swapped_are_both_told(make_folder: MakeFolder, tmp_path: Path) -> None:
    base = make_folder("llama")
    adapter = adapter_for(base, tmp_path / "lora", "q_proj")
    with pytest.raises(ConfigError, match="is an adapter, not a full model"):
        open_source(parse_ref(adapter))
    with pytest.raises(ConfigError, match="is an adapter, not a full model"):
        open_source(parse_ref(f"{adapter}+{base}"))
    with pytest.raises(ConfigError, match="is a full model, not an adapter"):
        open_source(parse_ref(f"{base}+{base}"))


def test_an_adapter_on_a_tied_embedding_is_refused(make_folder: MakeFolder, tmp_path: Path) -> None:
    base = make_folder("qwen2")
    adapter = adapter_for(base, tmp_path / "lora", "embed_tokens")
    with pytest.raises(ModelMismatchError, match="changes a tensor that the base ties to another"):
        open_source(parse_ref(f"{base}+{adapter}"))


def written(folder: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return Checkpoint(folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_first_number_that_is_none_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: float, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(sources, "_CHUNK", 7)
    good, broken = torch.zeros(4, 5, dtype=dtype), torch.zeros(6, 5, dtype=dtype)
    assert first_nonfinite(written(tmp_path, {"a": good, "b": broken, "ids": torch.arange(3)})) is None
    broken[3, 4] = broken[5, 0] = bad
    assert first_nonfinite(written(tmp_path, {"a": good, "b": broken})) == ("b", 19)


def test_the_stored_dtype_is_that_of_most_bytes(tmp_path: Path) -> None:
    tensors = {"norm": torch.ones(3), "matrix": torch.ones(20, dtype=torch.bfloat16), "ids": torch.arange(90)}
    assert stored_dtype(written(tmp_path, tensors)) == torch.bfloat16
    assert stored_dtype(written(tmp_path, {"ids": torch.arange(9)})) == torch.float32
