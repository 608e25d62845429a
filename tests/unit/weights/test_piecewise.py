# SPDX-License-Identifier: Apache-2.0
"""Different edits for different tensors, each with its own models in its roles."""

import pytest
import torch

from keelwright.core.errors import ModelMismatchError
from keelwright.core.protocols import Reach, TensorEntry
from keelwright.repair.linear import Linear, LinearConfig
from keelwright.repair.passthrough import Passthrough
from keelwright.repair.ties import Ties, TiesConfig
from keelwright.weights.piecewise import LAYOUT, Blueprint, Part, Piecewise
from keelwright.weights.plan import plan_edit
from keelwright.weights.sources import Excerpt, RenamedSource, innermost, source_digest
from keelwright.weights.stream import evaluate
from keelwright.weights.survey import with_survey


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def models(memory):
    one = {"layers.0.w": draw(1, 4, 5), "layers.1.w": draw(2, 4, 5), "embed": draw(3, 6, 5)}
    two = {name: tensor + 0.1 * draw(9, *tensor.shape) for name, tensor in one.items()}
    return {"one": memory(one), "two": memory(two)}


def whole(edit, sources, name):
    entry = sources[LAYOUT].entries()[name]
    return torch.cat([values for _, values in evaluate(edit, sources, entry)]).view(entry.shape)


def entries(**shapes):
    return {
        name.replace("__", "."): TensorEntry(name.replace("__", "."), "F32", shape) for name, shape in shapes.items()
    }


def linear(coefficient):
    return Part(Linear(LinearConfig(coefficient)), (("aligned", "one"), ("tuned", "two")))


def test_each_tensor_has_its_own_settings_and_models(models):
    edit = Piecewise(
        (linear(0.25), Part(Passthrough(), (("tuned", "two"),))), {"layers.0.w": 0, "embed": 1}, ("one", "two")
    )
    layout = Blueprint(entries(layers__0__w=(4, 5), embed=(6, 5)), "out")
    sources = {**models, LAYOUT: layout}
    one, two = models["one"].tensors, models["two"].tensors
    assert edit.reads("embed") == ("two",) and edit.reach("embed") is Reach.COPY and edit.copies("embed") == "two"
    assert torch.equal(whole(edit, sources, "embed"), two["embed"])
    expected = 0.75 * one["layers.0.w"] + 0.25 * two["layers.0.w"]
    assert torch.allclose(whole(edit, sources, "layers.0.w"), expected, atol=1e-7)
    plan = plan_edit(edit, sources, tied=False)
    assert {one.entry.name for one in plan.tensors} == {"layers.0.w", "embed"}


def test_layers_can_be_read_under_other_names(models):
    renamed = RenamedSource(models["one"], {"layers.0.w": "layers.1.w", "layers.1.w": "layers.0.w"})
    edit = Piecewise((Part(Passthrough(), (("tuned", "one"),)),), {"layers.0.w": 0, "layers.1.w": 0}, ("one",))
    sources = {"one": renamed, LAYOUT: Blueprint(entries(layers__0__w=(4, 5), layers__1__w=(4, 5)), "out")}
    assert torch.equal(whole(edit, sources, "layers.0.w"), models["one"].tensors["layers.1.w"])
    assert innermost(Excerpt(renamed, ["layers.0.w"])) is models["one"]
    assert source_digest(renamed) != source_digest(models["one"])


def test_reductions_and_surveys_belong_to_their_own_part(models):
    config = TiesConfig(density=0.4, trim_scope="model")
    trimmed = Part(Ties(config), (("aligned", "one"), ("tuned", "two")))
    edit = Piecewise((trimmed, linear(0.5)), {"layers.0.w": 0, "layers.1.w": 0, "embed": 1}, ("one", "two"))
    layout = Blueprint(entries(layers__0__w=(4, 5), layers__1__w=(4, 5), embed=(6, 5)), "out")
    sources = {**models, LAYOUT: layout}
    known = with_survey(edit, sources, layout.entries().values())
    assert known.survey() is None
    base, tuned = models["one"].tensors, models["two"].tensors
    deltas = {name: tuned[name] - base[name] for name in ("layers.0.w", "layers.1.w")}
    every = torch.cat([one.flatten() for one in deltas.values()]).abs().sort(descending=True).values
    threshold = every[int(0.4 * len(every)) - 1]
    for name, delta in deltas.items():
        expected = base[name] + torch.where(delta.abs() >= threshold, delta, 0.0)
        assert torch.allclose(whole(known, sources, name), expected, atol=1e-6)
    assert torch.allclose(whole(known, sources, "embed"), 0.5 * (base["embed"] + tuned["embed"]), atol=1e-6)


def test_a_tensor_that_a_part_reads_and_a_model_lacks_is_an_error(models, memory):
    sources = {"one": models["one"], "two": memory({"embed": draw(3, 6, 5)})}
    edit = Piecewise((linear(0.5),), {"layers.0.w": 0}, ("one", "two"))
    with pytest.raises(ModelMismatchError, match="'two' lacks a tensor that the edit reads"):
        plan_edit(edit, {**sources, LAYOUT: Blueprint(entries(layers__0__w=(4, 5)), "out")}, tied=False)


def test_a_shape_other_than_the_output_s_is_an_error(models):
    edit = Piecewise((linear(0.5),), {"layers.0.w": 0}, ("one", "two"))
    with pytest.raises(ModelMismatchError, match="another shape than the output"):
        plan_edit(edit, {**models, LAYOUT: Blueprint(entries(layers__0__w=(5, 4)), "out")}, tied=False)


def test_a_blueprint_has_no_values():
    with pytest.raises(TypeError, match="has no values"):
        Blueprint(entries(a=(1,)), "the output").read("a", 0, 1)
