# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys

import pytest

from keelwright.core.errors import ConfigError, MissingError
from keelwright.weights.recipes.explain import explain
from keelwright.weights.recipes.plan import expand
from keelwright.weights.recipes.reader import read_recipe, recipe_from_text
from keelwright.weights.recipes.recipe import TensorTask


def test_missing_file_is_named(tmp_path):
    with pytest.raises(MissingError, match=r"There is no file '.*ties\.yaml'"):
        read_recipe(tmp_path / "ties.yaml")


def test_file_that_is_too_large_or_no_text_is_refused(tmp_path):
    path = tmp_path / "big.yaml"
    path.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(ConfigError, match="too large for a recipe"):
        read_recipe(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_recipe(path)


@pytest.mark.parametrize(
    "text", ["a: [1", "a: *b", "\t a: 1", "a: !!python/name:os.system ''", "? [1]\n: 2", "[" * 5000]
)
def test_text_that_is_no_plain_yaml_is_refused(text):
    with pytest.raises(ConfigError, match="the recipe cannot be read"):
        recipe_from_text(text)


def test_json_is_yaml():
    text = '{"merge_method": "linear", "models": [{"model": "one", "parameters": {"weight": 1}}]}'
    assert recipe_from_text(text).models == {"one": "one"}


def test_merge_key_of_an_anchor_is_followed():
    text = "merge_method: linear\nmodels:\n  - &a {model: one, parameters: {weight: 1}}\n  - {<<: *a, model: two}\n"
    assert list(recipe_from_text(text).models) == ["one", "two"]


def test_unknown_method_of_our_recipes_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="There is no repair method 'tise'") as caught:
        recipe_from_text("keelwright: 1\nmethod: tise\naligned: a\ntuned: b\n")
    assert caught.value.fix == "did you mean 'ties'?"


def test_own_models_have_the_roles_of_the_edits():
    text = "keelwright: 1\nmethod: dare-ties\naligned: a\ntuned: [b, c, d]\nseed: 3\n"
    recipe = recipe_from_text(text)
    assert recipe.models == {"aligned": "a", "tuned": "b", "tuned_2": "c", "tuned_3": "d"}
    assert (recipe.method, recipe.base, recipe.donor, recipe.seed) == ("dare_ties", "aligned", "tuned", 3)


def test_own_linear_takes_a_coefficient_between_two_roles_or_weights_of_many():
    between = recipe_from_text("keelwright: 1\nmethod: linear\naligned: a\ntuned: b\ncoefficient: 0.3\n")
    many = recipe_from_text("keelwright: 1\nmethod: linear\ntuned: [b, c]\nweight.tuned: 1\nweight.tuned_2: 2\n")
    assert (list(between.models), list(many.models)) == (["aligned", "tuned"], ["tuned", "tuned_2"])


def test_own_recipe_leaves_what_it_does_not_name_to_the_defaults_of_the_config(headers):
    recipe = recipe_from_text("keelwright: 1\nmethod: ties\naligned: a\ntuned: b\n")
    task = expand(recipe, {"aligned": headers(), "tuned": headers()}).tasks[0]
    assert task.config_values() == {}


def test_tokenizer_and_dtypes_of_a_mergekit_file():
    text = (
        "merge_method: linear\nmodels: [{model: org/one, parameters: {weight: 1}}]\ndtype: torch.float32\n"
        "out_dtype: float16\ntokenizer: {source: org/other, pad_to_multiple_of: 64}\n"
    )
    recipe = recipe_from_text(text)
    assert (recipe.out_dtype, recipe.tokenizer_source, recipe.pad_to_multiple_of) == ("F16", "org/other", 64)


def test_reading_a_recipe_loads_neither_torch_nor_numpy():
    code = (
        "import sys; from keelwright.weights.recipes.reader import recipe_from_text as r;"
        "import keelwright.weights.recipes.explain;"
        "r('keelwright: 1\\nmethod: ties\\naligned: a\\ntuned: b\\n');"
        "sys.exit(bool({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_equal_layers_stand_in_one_row():
    def task(layer, rest, t):
        name = f"model.layers.{layer}.{rest}"
        return TensorTask(name, "slerp", (("one", name),), ("base", name), {"coefficient": t}, ({},))

    recipe = recipe_from_text("merge_method: slerp\nbase_model: base\nmodels: [{model: one}]\nparameters: {t: 0.5}\n")
    tasks = [
        task(layer, f"mlp.{part}.weight", 0.1 if layer in (0, 1, 2, 3, 7) else 0.2)
        for layer in range(8)
        for part in "ab"
    ]
    tasks += [task(layer, "attn.q.weight", 0.5) for layer in range(8)]
    rows = [(row.tensors, row.count, row.settings, row.action) for row in explain(recipe, tasks)]
    assert rows == [
        ("model.layers.{0-3,7}.mlp.*", 10, "coefficient 0.1", "computed"),
        ("model.layers.{0-7}.attn.q.weight", 8, "coefficient 0.5", "computed"),
        ("model.layers.{4-6}.mlp.*", 6, "coefficient 0.2", "computed"),
    ]
    assert sum(row[1] for row in rows) == len(tasks)
