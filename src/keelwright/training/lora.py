# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters on a live model: put on, read as factors, taken off again without a trace."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from keelwright.models.adapters import LoraFactors


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """An adapter that sits on a live model. The base weights are frozen until it is taken off."""

    model: PeftModel
    """The wrapped model; runs with the adapter."""
    base: PreTrainedModel
    """The model that was given; its linear layers hold the adapter's until `detach`."""
    was_trainable: dict[str, bool] = field(repr=False)

    def factors(self) -> dict[str, LoraFactors]:
        """Return a copy of the factors, by the name that the adapted weight has in the base model's checkpoint."""
        found: dict[str, LoraFactors] = {}
        for name, layer in self.base.named_modules():
            if hasattr(layer, "lora_A") and "default" in layer.lora_A:
                a, b = (getattr(layer, side)["default"].weight for side in ("lora_A", "lora_B"))
                left, right = (factor.detach().float().clone() for factor in (b, a))
                found[f"{name}.weight"] = LoraFactors(left, right, float(layer.scaling["default"]))
        return found

    def save(self, folder: Path) -> None:
        """Write the adapter as PEFT does: `adapter_config.json` and `adapter_model.safetensors`."""
        self.model.save_pretrained(folder, safe_serialization=True)

    def detach(self) -> PreTrainedModel:
        """Take the adapter off; the base model is then what it was before, flags included."""
        self.model.unload()
        for leftover in ("peft_config", "active_adapter"):
            self.base.__dict__.pop(leftover, None)
        for name, parameter in self.base.named_parameters():
            parameter.requires_grad_(self.was_trainable[name])
        return self.base


def attach_lora(module: PreTrainedModel, *, rank: int, alpha: float, seed: int) -> LoraAdapter:
    """Put a new LoRA adapter on every linear layer but the output head; it changes nothing until it is trained.

    Args:
        module: The live model; changed in place until `detach`.
        rank: Of the adapter, at least 1.
        alpha: Scale times rank.
        seed: Of the factors' initial values; the global random state is left as it was.
    """
    was_trainable = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=_cuda_devices(module)):
        torch.manual_seed(seed)
        wrapped = get_peft_model(module, config)
    return LoraAdapter(model=wrapped, base=module, was_trainable=was_trainable)


def _cuda_devices(module: nn.Module) -> list[torch.device]:
    return sorted({one.device for one in module.parameters() if one.device.type == "cuda"}, key=str)
