# SPDX-License-Identifier: Apache-2.0
"""The vision tower: a small CLIP encoder that has learnt to tell the scenes apart, before any language model sees it.

Real towers come pre-trained on pictures; this one is taught by classification, with heads that are thrown away.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from keelwright.core.config import require_in_range
from keelwright.core.seeds import derive_seed, generator
from keelwright.worlds.pictures.scenes import COLOURS, PLACES, SHAPES, SIDE, Ground, Scene, pixels, scenes, sign_map

PATCH = 4
"""Side of a patch, pixels: a picture has four, one for each quarter."""

IMAGE_TOKENS = (SIDE // PATCH) ** 2


@dataclass(frozen=True, slots=True)
class TowerConfig:
    """Size and schooling of the vision tower."""

    hidden_size: int = 64
    """Width, a multiple of 4."""
    layers: int = 2
    """Transformer layers."""
    steps: int = 600
    """AdamW steps, at least 1."""
    batch_size: int = 64
    """Pictures per step."""
    lr: float = 2e-3
    """Learning rate; falls linearly to a tenth."""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "layers", "steps", "batch_size"):
            require_in_range(name, getattr(self, name), low=1)
        require_in_range("lr", self.lr, low=0.0, low_open=True)


def tower_config(size: TowerConfig) -> CLIPVisionConfig:
    """Return the tower's settings as transformers reads them."""
    return CLIPVisionConfig(
        hidden_size=size.hidden_size,
        intermediate_size=2 * size.hidden_size,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        num_channels=3,
        projection_dim=size.hidden_size,
    )


def normalise(drawn: Tensor) -> Tensor:
    """Return pixels from -1 to 1, as the tower takes them."""
    return drawn.float() / 127.5 - 1.0


def train_tower(size: TowerConfig, seed: int) -> tuple[CLIPVisionModel, float]:
    """Return a tower that tells scenes apart, and the share of held-out scenes whose every feature can be read.

    Each colour, shape, place and meaning has a fixed random vector; the tower learns to give the sum of a scene's four,
    as the mean over its patches. So all four are there in equal strength: a tower taught by classification hides the
    place, which is easy to classify, in a fiftieth of its variance, and a projector does not find it.

    Args:
        size: Size and schooling.
        seed: Of its weights and of the order of the pictures.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "pictures", "tower"))
        tower = CLIPVisionModel(tower_config(size)).train()
    shown, features = normalise(pixels()[:-1]), torch.tensor([_features(scene) for scene in scenes()])
    vectors = [
        torch.randn(count, size.hidden_size, generator=generator(seed, "pictures", "tower vectors", index))
        for index, count in enumerate(_COUNTS)
    ]
    targets = sum((table[features[:, index]] for index, table in enumerate(vectors)), torch.zeros(()))
    learnt = torch.tensor([scene.split == "train" for scene in scenes()])
    optimizer = torch.optim.AdamW(tower.parameters(), lr=size.lr, betas=(0.9, 0.95), weight_decay=0.01)
    stream, places = generator(seed, "pictures", "tower order"), learnt.nonzero()[:, 0]
    for step in range(size.steps):
        picked = places[torch.randint(len(places), (size.batch_size,), generator=stream)]
        loss = nn.functional.mse_loss(_patches(tower, shown[picked]).mean(dim=1), targets[picked])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = size.lr * (1.0 - 0.9 * step / size.steps)
        optimizer.step()
    tower.eval()
    with torch.no_grad():
        given = _patches(tower, shown[~learnt]).mean(dim=1)
    nearest = torch.cdist(given, _unique(targets)).argmin(dim=1)
    right = (_unique(targets)[nearest] == targets[~learnt]).all(dim=1)
    return tower, float(right.float().mean())


_SIGNS = {(ground, sign): index for index, (ground, sign) in enumerate(
    (ground, sign) for ground in get_args(Ground) for sign in sign_map(ground).values()
)}  # fmt: skip
_COUNTS = (len(COLOURS), len(SHAPES), len(PLACES), len(_SIGNS))


def _features(scene: Scene) -> tuple[int, int, int, int]:
    sign = _SIGNS[scene.ground, (scene.colour, scene.shape)]
    return [*COLOURS].index(scene.colour), [*SHAPES].index(scene.shape), [*PLACES].index(scene.place), sign


def _unique(targets: Tensor) -> Tensor:
    """Return one target for each sign and place; the four pixels to begin at share theirs."""
    return targets.view(-1, 4, targets.shape[-1])[:, 0]


def _patches(tower: CLIPVisionModel, shown: Tensor) -> Tensor:
    """Return the patch states that a language model is given. Shape `[pictures, patches, hidden]`."""
    states: Tensor = tower(shown, output_hidden_states=True).hidden_states[-1][:, 1:]
    return states
