# SPDX-License-Identifier: Apache-2.0
import pytest

from keelwright.core.protocols import TensorEntry
from keelwright.weights.recipes.layers import Place, comes_after_layers, layout_of


def entries(*names, shape=(4, 4)):
    return {name: TensorEntry(name, "F32", shape) for name in names}


@pytest.mark.parametrize(
    ("prefix", "rest"),
    [
        ("model.layers", "mlp.up_proj.weight"),
        ("transformer.h", "attn.c_attn.weight"),
        ("h", "attn.c_attn.weight"),
        ("gpt_neox.layers", "attention.dense.weight"),
        ("model.decoder.layers", "fc1.weight"),
        ("model.language_model.layers", "mlp.up_proj.weight"),
        ("backbone.layers", "mixer.in_proj.weight"),
    ],
)
def test_numbered_run_is_found_whatever_the_architecture_calls_it(prefix, rest):
    found = layout_of(entries(*(f"{prefix}.{layer}.{rest}" for layer in range(12)), "lm_head.weight"))
    assert (found.main.prefix, found.main.layers, found.others) == (prefix, 12, ())
    assert found.places[Place("", 11, rest)] == f"{prefix}.11.{rest}"
    assert found.name_of(Place("", 20, rest)) == f"{prefix}.20.{rest}"


def test_experts_inside_a_layer_are_no_layers():
    names = [f"model.layers.{a}.mlp.experts.{b}.w1.weight" for a in range(2) for b in range(8)]
    found = layout_of(entries(*names))
    assert (found.main.prefix, found.main.layers, found.others) == ("model.layers", 2, ())


def test_larger_vision_tower_is_not_taken_for_the_text_stack(seeing):
    found = layout_of(seeing)
    assert (found.main.prefix, found.main.layers) == ("model.language_model.layers", 4)
    assert [(one.prefix, one.layers) for one in found.others] == [("model.vision_tower.blocks", 6)]


def test_run_with_holes_is_no_stack(seeing):
    assert Place(None, 0, "model.multi_modal_projector.2.weight") in layout_of(seeing).places


def test_largest_stack_wins_where_names_do_not_tell():
    small, large = entries(*(f"a.{n}.w" for n in range(9))), entries(*(f"b.{n}.w" for n in range(3)), shape=(99, 99))
    assert layout_of({**small, **large}).main.prefix == "b"


def test_model_without_layers_has_places_all_the_same():
    found = layout_of(entries("embed.weight", "head.weight"))
    assert (found.main, found.layers("")) == (None, 0)
    assert sorted(found.places.values()) == ["embed.weight", "head.weight"]


def test_text_parts_of_differently_named_models_share_their_places(headers):
    plain, nested = layout_of(headers()), layout_of(headers(root="model.language_model"))
    assert set(plain.places) == set(nested.places)
    place = next(place for place, name in plain.places.items() if name == "model.norm.weight")
    assert nested.name_of(place) == "model.language_model.norm.weight"


@pytest.mark.parametrize(
    ("name", "after"),
    [
        ("model.embed_tokens.weight", False),
        ("transformer.wte.weight", False),
        ("transformer.wpe.weight", False),
        ("transformer.word_embeddings_layernorm.weight", False),
        ("model.decoder.project_in.weight", False),
        ("model.norm.weight", True),
        ("transformer.ln_f.bias", True),
        ("gpt_neox.final_layer_norm.weight", True),
        ("embed_out.weight", True),
        ("lm_head.bias", True),
        ("model.decoder.project_out.weight", True),
    ],
)
def test_what_lies_outside_the_layers_is_before_or_after_them(name, after):
    assert comes_after_layers(name) is after
