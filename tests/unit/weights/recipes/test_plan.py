# SPDX-License-Identifier: Apache-2.0
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keelwright.core.errors import ConfigError, ModelMismatchError
from keelwright.weights.recipes.plan import expand
from keelwright.weights.recipes.reader import recipe_from_text


def tasks_of(text, headers_for, **choices):
    recipe = recipe_from_text(text)
    return {task.output_name: task for task in expand(recipe, headers_for(recipe), **choices).tasks}


PRECEDENCE = """
merge_method: ties
base_model: base
slices:
  - sources:
      - {model: base, layer_range: [0, 4]}
      - model: one
        layer_range: [0, 4]
        parameters: {weight: {filter: mlp, value: 1}}
      - model: two
        layer_range: [0, 4]
        parameters: {weight: 5, density: []}
    parameters:
      weight: [{filter: q_proj, value: 2}]
      lambda: {filter: mlp, value: 0.5}
parameters: {weight: 4, density: 0.25, lambda: 0.9}
"""


@pytest.mark.parametrize(
    ("rest", "weights", "strength"),
    [
        ("mlp.up_proj", (1.0, 5.0), 0.5),
        ("self_attn.q_proj", (2.0, 5.0), 0.9),
        ("self_attn.o_proj", (4.0, 5.0), 0.9),
    ],
)
def test_source_beats_slice_beats_top_and_what_fits_nowhere_falls_through(headers_for, rest, weights, strength):
    task = tasks_of(PRECEDENCE, headers_for)[f"model.layers.1.{rest}.weight"]
    assert tuple(one["weight"] for one in task.per_model) == weights
    assert tuple(one["density"] for one in task.per_model) == (0.25, 0.25)
    assert task.settings["coefficient"] == strength


def test_module_stands_between_slice_and_top(headers_for):
    text = """
merge_method: slerp
base_model: base
modules:
  text_decoder:
    slices:
      - sources: [{model: base, layer_range: [0, 4]}, {model: one, layer_range: [0, 4]}]
        parameters: {t: {filter: mlp, value: 0.1}}
    parameters: {t: {filter: self_attn, value: 0.2}}
parameters: {t: 0.3}
"""
    found = tasks_of(text, headers_for)
    rests = ("mlp.up_proj", "self_attn.q_proj", "input_layernorm")
    assert [found[f"model.layers.2.{rest}.weight"].settings["coefficient"] for rest in rests] == [0.1, 0.2, 0.3]


def test_per_model_filters_see_the_inputs_name_and_shared_ones_the_outputs(headers_for):
    text = """
merge_method: task_arithmetic
base_model: base
slices:
  - sources:
      - {model: base, layer_range: [2, 4]}
      - {model: one, layer_range: [1, 3], parameters: {weight: [{filter: layers.1., value: 0.1}, {value: 0.7}]}}
parameters:
  lambda: [{filter: layers.1., value: 0.2}, {value: 0.9}]
"""
    found = tasks_of(text, headers_for)
    first, second = (found[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in (0, 1))
    assert (first.base, first.inputs) == (
        ("base", "model.layers.2.mlp.up_proj.weight"),
        (("one", "model.layers.1.mlp.up_proj.weight"),),
    )
    assert (first.per_model[0]["weight"], first.settings["coefficient"]) == (0.1, 0.9)
    assert (second.per_model[0]["weight"], second.settings["coefficient"]) == (0.7, 0.2)


def test_gradients_restart_in_every_slice_and_a_lone_layer_is_at_depth_one(headers_for):
    text = """
merge_method: slerp
base_model: base
slices:
  - sources: [{model: base, layer_range: [0, 3]}, {model: one, layer_range: [0, 3]}]
    parameters: {t: [0, 1]}
  - sources: [{model: base, layer_range: [2, 4]}, {model: one, layer_range: [2, 4]}]
  - sources: [{model: base, layer_range: [3, 4]}, {model: one, layer_range: [3, 4]}]
parameters: {t: [0.2, 0.8]}
"""
    found = tasks_of(text, headers_for)
    depths = [found[f"model.layers.{layer}.mlp.up_proj.weight"].settings["coefficient"] for layer in range(6)]
    assert depths == pytest.approx([0, 0.5, 1, 0.2, 0.8, 0.8])
    # Embeddings follow the first slice, norm and head the last; both at depth 0.
    assert found["model.embed_tokens.weight"].settings["coefficient"] == 0.0
    assert found["model.norm.weight"].settings["coefficient"] == 0.2
    assert found["lm_head.weight"].settings["coefficient"] == 0.2


def test_output_layers_run_on_over_repeated_and_overlapping_ranges(headers_for):
    text = """
merge_method: passthrough
slices:
  - sources: [{model: one, layer_range: [0, 3]}]
  - sources: [{model: two, layer_range: [1, 4]}]
  - sources: [{model: one, layer_range: [1, 2]}]
"""
    recipe = recipe_from_text(text)
    expansion = expand(recipe, headers_for(recipe))
    found = {task.output_name: task for task in expansion.tasks}
    taken = [found[f"model.layers.{layer}.input_layernorm.weight"].inputs[0] for layer in range(7)]
    assert [(model, int(name.split(".")[2])) for model, name in taken] == [
        *(("one", layer) for layer in range(3)),
        *(("two", layer) for layer in range(1, 4)),
        ("one", 1),
    ]
    assert (expansion.num_hidden_layers, expansion.layers) == (7, {"model.layers": 7})
    assert found["model.embed_tokens.weight"].inputs[0][0] == "one"
    assert all(task.is_copy() for task in expansion.tasks)


def test_base_of_a_slice_wins_over_the_base_at_the_top(headers_for):
    text = """
merge_method: task_arithmetic
base_model: base
slices:
  - base_model: two
    sources: [{model: two, layer_range: [0, 2]}, {model: one, layer_range: [0, 2]}]
  - sources: [{model: base, layer_range: [2, 4]}, {model: one, layer_range: [2, 4]}]
parameters: {weight: 1}
"""
    found = tasks_of(text, headers_for)
    assert found["model.layers.1.input_layernorm.weight"].base[0] == "two"
    assert found["model.layers.2.input_layernorm.weight"].base[0] == "base"
    assert found["lm_head.weight"].base[0] == "base"


def test_slice_with_only_the_base_is_copied(headers_for):
    text = """
merge_method: ties
base_model: base
slices:
  - sources: [{model: base, layer_range: [0, 2]}]
  - sources: [{model: base, layer_range: [2, 4]}, {model: one, layer_range: [2, 4]}]
parameters: {weight: 1}
"""
    found = tasks_of(text, headers_for)
    assert found["model.layers.0.input_layernorm.weight"].is_copy()
    assert found["model.layers.2.input_layernorm.weight"].method == "ties"


def test_base_named_in_slices_of_a_method_without_one_only_gives_config_and_tokenizer(headers_for):
    text = """
merge_method: linear
base_model: base
slices:
  - sources: [{model: one, layer_range: [0, 4]}, {model: two, layer_range: [0, 4]}]
parameters: {weight: 1}
"""
    recipe = recipe_from_text(text)
    task = expand(recipe, headers_for(recipe)).tasks[0]
    assert (recipe.donor, task.base, [model for model, _ in task.inputs]) == ("base", None, ["one", "two"])


def test_base_listed_for_linear_is_a_model_like_the_others(headers_for):
    text = "merge_method: linear\nbase_model: base\nmodels: [{model: one}, {model: base}]\nparameters: {weight: 1}\n"
    task = tasks_of(text, headers_for)["lm_head.weight"]
    assert (task.base, [model for model, _ in task.inputs]) == (None, ["one", "base"])
    assert task.config_values() == {"weight": (1.0, 1.0), "normalize": True}


def test_settings_come_as_the_fields_of_the_config(headers_for):
    text = """
merge_method: della
base_model: base
models:
  - {model: one, parameters: {weight: 0.7, density: 0.6}}
  - {model: two, parameters: {weight: 0.3}}
parameters: {lambda: 1.1, density: 0.5}
"""
    assert tasks_of(text, headers_for)["lm_head.weight"].config_values() == {
        "normalize": True,
        "coefficient": 1.1,
        "rescale": "l1",
        "weight": (0.7, 0.3),
        "density": (0.6, 0.5),
        "epsilon": (0.15, 0.15),
    }


def test_negative_weight_is_fine_where_nothing_divides_by_it(headers_for):
    text = "merge_method: ties\nbase_model: base\nmodels: [{model: one}]\nparameters: {weight: -1, normalize: false}\n"
    assert tasks_of(text, headers_for)["lm_head.weight"].per_model[0]["weight"] == -1.0


def test_negative_weight_of_one_layer_alone_is_refused_by_that_layer(headers_for):
    text = "merge_method: ties\nbase_model: base\nmodels: [{model: one}]\nparameters: {weight: [1, -0.5]}\n"
    with pytest.raises(ConfigError, match=r"'ties' at 'model\.layers\.3\..*negative weight"):
        tasks_of(text, headers_for)


LINEAR = "merge_method: linear\nmodels: [{model: one}, {model: two}]\nparameters: {weight: 1}\n"


def test_tied_head_is_read_from_the_embedding_where_the_other_model_has_its_own(headers):
    entries = {"one": headers(head=False), "two": headers()}
    tied = {"one": {"lm_head.weight": "model.embed_tokens.weight"}, "two": {}}
    expansion = expand(recipe_from_text(LINEAR), entries, tied=tied)
    head = next(task for task in expansion.tasks if task.output_name == "lm_head.weight")
    assert head.inputs == (("one", "model.embed_tokens.weight"), ("two", "lm_head.weight"))
    with pytest.raises(ModelMismatchError, match=r"'lm_head\.weight' is not in all"):
        expand(recipe_from_text(LINEAR), entries)


def test_head_that_every_model_ties_is_not_written(headers):
    pairs = {"lm_head.weight": "model.embed_tokens.weight"}
    entries = {"one": headers(head=False), "two": headers(head=False)}
    expansion = expand(recipe_from_text(LINEAR), entries, tied={"one": pairs, "two": pairs})
    assert "lm_head.weight" not in {task.output_name for task in expansion.tasks}
    assert expansion.unwritten == ("lm_head.weight",)


@pytest.mark.parametrize("method", ["slerp", "nuslerp", "arcee_fusion"])
def test_tensor_of_one_model_alone_is_copied_and_the_plan_says_so(headers, method):
    listed = "[{model: base}, {model: one}]" if method == "nuslerp" else "[{model: one}]"
    base = "" if method == "nuslerp" else "base_model: base\n"
    given = {"slerp": "parameters: {t: 0.5}\n", "nuslerp": "parameters: {weight: 1}\n", "arcee_fusion": ""}[method]
    recipe = recipe_from_text(f"merge_method: {method}\n{base}models: {listed}\n{given}")
    found = {task.output_name: task for task in expand(recipe, {"base": headers(), "one": headers(biases=True)}).tasks}
    task = found["model.layers.2.self_attn.q_proj.bias"]
    assert (task.is_copy(), task.inputs[0][0], task.note) == (True, "one", "only 'one' has it")


def test_tensor_in_two_of_three_models_is_never_dropped(headers):
    text = "merge_method: model_stock\nbase_model: base\nmodels: [{model: one}, {model: two}]\n"
    entries = {"base": headers(), "one": headers(biases=True), "two": headers(biases=True)}
    with pytest.raises(ModelMismatchError, match="is not in all"):
        expand(recipe_from_text(text), entries)


def test_own_recipe_reads_a_text_model_into_the_text_stack_of_one_with_eyes(headers, seeing):
    text = "keelwright: 1\nmethod: linear\naligned: a\ntuned: v\ncoefficient: 0.5\nscope: language_model\n"
    found = {
        task.output_name: task for task in expand(recipe_from_text(text), {"aligned": headers(), "tuned": seeing}).tasks
    }
    assert set(found) == set(seeing)
    name = "model.language_model.layers.3.mlp.up_proj.weight"
    assert found[name].inputs == (("aligned", "model.layers.3.mlp.up_proj.weight"), ("tuned", name))
    assert found["model.vision_tower.blocks.5.mlp.up_proj.weight"].is_copy()


def test_rule_that_fits_no_tensor_is_reported(headers_for):
    recipe = recipe_from_text(
        "merge_method: slerp\nbase_model: base\nmodels: [{model: one}]\n"
        "parameters: {t: [{filter: self_atn, value: 1}, {value: 0.5}]}\n"
    )
    assert expand(recipe, headers_for(recipe)).warnings == (
        "recipe: the filter 'self_atn' of 't' fits no tensor: a filter is a part of the name, compared as plain text.",
    )


def shuffled(value, rng):
    if isinstance(value, dict):
        items = list(value.items())
        rng.shuffle(items)
        return {key: shuffled(one, rng) for key, one in items}
    return [shuffled(one, rng) for one in value] if isinstance(value, list) else value


WEIGHTS = st.one_of(
    st.floats(0.1, 2),
    st.lists(st.floats(0.1, 2), max_size=4),
    st.lists(
        st.fixed_dictionaries(
            {"filter": st.sampled_from(["mlp", "self_attn", "norm", "layers.1."]), "value": st.floats(0.1, 2)}
        ),
        max_size=3,
    ),
)


@given(WEIGHTS, WEIGHTS, WEIGHTS, st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_resolution_never_depends_on_the_order_of_keys_or_tensors(first, second, third, seed):
    import yaml

    document = {
        "merge_method": "ties",
        "base_model": "base",
        "slices": [
            {
                "sources": [
                    {"model": "base", "layer_range": [0, 2]},
                    {"model": "one", "layer_range": [1, 3], "parameters": {"weight": first, "density": 0.5}},
                    {"model": "two", "layer_range": [2, 4], "parameters": {"weight": second}},
                ],
                "parameters": {"weight": third, "lambda": [0.5, 1.5]},
            },
            {"sources": [{"model": "two", "layer_range": [0, 1]}, {"model": "base", "layer_range": [3, 4]}]},
        ],
        "parameters": {"weight": 0.3, "density": 0.9, "normalize": True},
    }
    rng = random.Random(seed)
    names = [f"model.layers.{n}.{rest}" for n in range(4) for rest in ("mlp.w", "self_attn.w", "norm.w")]
    names += ["model.embed.weight", "model.norm.weight", "lm_head.weight"]
    outcomes = []
    for text in (yaml.safe_dump(document, sort_keys=False), yaml.safe_dump(shuffled(document, rng), sort_keys=False)):
        order = rng.sample(names, len(names))
        entries = {key: {name: _entry(name) for name in order} for key in rng.sample(["base", "one", "two"], 3)}
        outcomes.append(expand(recipe_from_text(text), entries).tasks)
    assert outcomes[0] == outcomes[1]


def _entry(name):
    from keelwright.core.protocols import TensorEntry

    return TensorEntry(name, "F32", (2, 2))
