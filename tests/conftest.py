# SPDX-License-Identifier: Apache-2.0
"""Settings of every test: offline, one torch thread, shapes checked at run time."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

SHAPED = (
    "karcher",
    "linear",
    "lm_cocktail",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "passthrough",
    "resta",
    "slerp",
    "wise_ft",
)
install_import_hook(["keelwright.ops", *(f"keelwright.repair.{name}" for name in SHAPED)], "beartype.beartype")

import torch

torch.set_num_threads(1)
