# SPDX-License-Identifier: Apache-2.0
"""Headers of small models: what a recipe is expanded on. No tensor has values here."""

import pytest

from keelwright.core.protocols import TensorEntry

LAYER = {
    "self_attn.q_proj.weight": (8, 8),
    "self_attn.o_proj.weight": (8, 8),
    "mlp.up_proj.weight": (16, 8),
    "mlp.down_proj.weight": (8, 16),
    "input_layernorm.weight": (8,),
}


def entries_of(shapes):
    return {name: TensorEntry(name, "BF16", shape) for name, shape in shapes.items()}


def text_shapes(layers=4, root="model", head=True, biases=False):
    shapes = {f"{root}.embed_tokens.weight": (32, 8), f"{root}.norm.weight": (8,)}
    for layer in range(layers):
        shapes |= {f"{root}.layers.{layer}.{rest}": shape for rest, shape in LAYER.items()}
        if biases:
            shapes[f"{root}.layers.{layer}.self_attn.q_proj.bias"] = (8,)
    if head:
        shapes["lm_head.weight"] = (32, 8)
    return shapes


def seeing_shapes():
    """A model with more layers of vision than of text, as many checkpoints have."""
    shapes = text_shapes(root="model.language_model")
    shapes["model.vision_tower.patch_embed.weight"] = (8, 4)
    for layer in range(6):
        shapes |= {f"model.vision_tower.blocks.{layer}.{rest}": shape for rest, shape in LAYER.items()}
    shapes["model.multi_modal_projector.0.weight"] = (8, 8)
    shapes["model.multi_modal_projector.2.weight"] = (8, 8)
    return shapes


KINDS = {
    "deep": lambda: text_shapes(layers=6),
    "biased": lambda: text_shapes(biases=True),
    "seeing": seeing_shapes,
    "seeing_two": seeing_shapes,
}


def _headers_for(recipe):
    return {key: entries_of(KINDS.get(reference, text_shapes)()) for key, reference in recipe.models.items()}


@pytest.fixture(scope="session")
def headers_for():
    """Return the tensors of each model of a recipe; which shapes a model has is told by its name."""
    return _headers_for


@pytest.fixture(scope="session")
def headers():
    """Return the tensors of a text model: `headers(layers=4, root="model", head=True, biases=False)`."""
    return lambda **choices: entries_of(text_shapes(**choices))


@pytest.fixture(scope="session")
def seeing():
    """Return the tensors of a model with a vision tower."""
    return entries_of(seeing_shapes())
