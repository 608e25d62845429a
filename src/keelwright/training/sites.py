# SPDX-License-Identifier: Apache-2.0
"""Where a model's blocks and their attention lie, in any architecture of transformers and under PEFT's adapters.

Blocks are the members of the longest list of modules that is no part of another one and is not in a vision or audio
tower. Nothing here depends on a class: only on how the modules lie and what they are called.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Final

from torch.nn import Module, ModuleList

from keelwright.core.errors import ConfigError

Sites = Callable[[Module], Mapping[str, Module]]
"""Returns modules by the name that they have in the model, in the order of the blocks."""

_OTHER_TOWERS: Final = re.compile(r"(?:^|[._])(?:vision|visual|image|audio|speech)")
"""Names of towers that read no text."""
_ATTENTION: Final = re.compile(r"^(?:self_|linear_|cross_)?att(?:n|ention)$")
"""What attention is called in a block: `self_attn`, `attn`, `attention`, `self_attention`, `linear_attn`."""
_MIXERS: Final = ("mixer", "mamba", "temporal_block", "conv")
"""What mixes tokens in blocks without attention."""


def blocks(module: Module) -> dict[str, Module]:
    """Return the model's blocks by name, first to last.

    Raises:
        ConfigError: The model has no list of blocks.
    """
    found: list[tuple[str, ModuleList]] = []
    for name, child in module.named_modules():
        inside = any(name.startswith(f"{other}.") for other, _ in found)
        if isinstance(child, ModuleList) and len(child) and not inside and not _OTHER_TOWERS.search(name):
            found.append((name, child))
    if not found:
        parts = ", ".join(name for name, _ in module.named_children())
        raise ConfigError(
            "The model's blocks were not found.",
            expected="a torch ModuleList of transformer blocks",
            found=f"{type(module).__name__} with {parts or 'no parts'}",
            fix="use a model of transformers, or a method that does not work on blocks",
        )
    name, longest = max(found, key=lambda one: len(one[1]))
    return {f"{name}.{index}": block for index, block in enumerate(longest)}


def attention_outputs(module: Module) -> dict[str, Module]:
    """Return, for each block, the module whose output attention adds to the hidden states.

    In a block that mixes tokens otherwise (Mamba, convolution) it is the module that does so.

    Raises:
        ConfigError: A block has none.
    """
    found: dict[str, Module] = {}
    for name, block in blocks(module).items():
        inner = _mixing(block)
        if inner is None:
            raise ConfigError(
                f"The block '{name}' has no attention that is known by its name.",
                expected="a part such as 'self_attn', 'attn', 'attention' or 'mamba'",
                found=", ".join(part for part, _ in block.named_children()) or "no parts",
                fix="give the shift its own `sites`",
            )
        found[f"{name}.{inner}"] = block.get_submodule(inner)
    return found


def _mixing(block: Module) -> str | None:
    """Return the name, within a block, of what mixes tokens; attention before anything else, outer before inner."""
    names = sorted((name for name, _ in block.named_modules() if name), key=lambda name: name.count("."))
    for name in names:
        if _ATTENTION.match(name.rpartition(".")[2]):
            return name
    return next((name for name in names if name in _MIXERS), None)
