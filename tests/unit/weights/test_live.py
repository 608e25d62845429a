# SPDX-License-Identifier: Apache-2.0
"""Trials in memory."""

import math

import pytest
import torch

from keelwright.core.errors import ModelMismatchError, NumericalError
from keelwright.models.adapters import AdaptedCheckpoint, read_adapter
from keelwright.models.checkpoint import Checkpoint
from keelwright.repair.linear import Linear, LinearConfig
from keelwright.repair.resta import Resta, RestaConfig
from keelwright.weights.edit import Edit
from keelwright.weights.live import LiveSource, LiveTrial

HALF = Linear(LinearConfig(0.5))


def values_of(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def models(request, tmp_path, make_llama, dtype):
    """Return the sources of an aligned and a tuned checkpoint, and the tuned model live."""
    for seed, role in enumerate(("aligned", "tuned")):
        make_llama(seed, dtype=dtype, tied=request.param).save_pretrained(tmp_path / role)
    sources = {role: Checkpoint(tmp_path / role) for role in ("aligned", "tuned")}
    return sources, make_llama(1, dtype=dtype, tied=request.param)


def test_a_source_gives_each_tied_tensor_once(make_llama):
    names = set(LiveSource(make_llama(tied=True)).entries())
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    assert "lm_head.weight" in LiveSource(make_llama(tied=False)).entries()


def test_a_source_reads_the_values_of_the_moment_and_a_frozen_one_those_of_then(make_llama):
    module = make_llama()
    live = LiveSource(module, "the model")
    frozen = live.frozen()
    before = live.read("model.norm.weight", 2, 5)
    with torch.no_grad():
        module.model.norm.weight.add_(1)
    assert torch.equal(live.read("model.norm.weight", 2, 5), before + 1)
    assert torch.equal(frozen.read("model.norm.weight", 2, 5), before)
    assert frozen.entries() == live.entries() and frozen.describe() == "the model"
    assert frozen.config_json()["model_type"] == "llama"


def test_what_is_read_belongs_to_the_caller(make_llama):
    module = make_llama()
    live = LiveSource(module)
    frozen = live.frozen()
    for source in (live, frozen):
        source.read("model.norm.weight", 0, 16).zero_()
    assert module.model.norm.weight.abs().sum() > 0 and frozen.read("model.norm.weight", 0, 16).abs().sum() > 0


def test_apply_writes_the_rounded_edit_and_undo_gives_every_bit_back(models, dtype):
    sources, module = models
    before = values_of(module)
    trial = LiveTrial(module, sources)
    change = trial.apply(HALF)
    for name, value in module.state_dict().items():
        if name not in sources["aligned"].entries():
            continue
        entry = sources["aligned"].entries()[name]
        aligned = sources["aligned"].read(name, 0, entry.elements).view(entry.shape).float()
        assert torch.equal(value, (0.5 * aligned + 0.5 * before[name].float()).to(dtype))
    assert change.tensors_changed == len(sources["tuned"].entries())
    trial.undo()
    assert same(values_of(module), before)


def test_the_relative_norm_is_that_of_the_weights(models):
    sources, module = models
    trial = LiveTrial(module, sources)
    before = {name: one.detach().double() for name, one in values_of(module).items()}
    names = sources["tuned"].entries()
    change = trial.apply(HALF)
    moved = sum(float((module.state_dict()[name].double() - before[name]).square().sum()) for name in names)
    size = sum(float(before[name].square().sum()) for name in names)
    assert change.relative_norm == pytest.approx(math.sqrt(moved / size), rel=1e-7)  # differences are taken in float32


def test_the_tuned_end_changes_nothing(models):
    sources, module = models
    change = LiveTrial(module, sources).apply(Linear(LinearConfig(1.0)))
    assert change.relative_norm == 0.0 and change.tensors_changed == 0


def test_trials_do_not_drift(models):
    sources, module = models
    trial = LiveTrial(module, sources)
    trial.apply(HALF)
    once = values_of(module)
    for coefficient in (0.1, 0.9, 0.0, 0.7):
        trial.apply(Linear(LinearConfig(coefficient)))
    trial.apply(HALF)
    assert same(values_of(module), once)


def test_leaving_the_context_undoes_also_after_an_error(models):
    sources, module = models
    before = values_of(module)
    with pytest.raises(RuntimeError, match="in mid-trial"), LiveTrial(module, sources) as trial:
        trial.apply(HALF)
        raise RuntimeError("in mid-trial")
    assert same(values_of(module), before)


def test_a_small_move_beside_large_ones_is_counted(memory, make_llama, edit_of):
    module = make_llama()
    tuned = LiveSource(module)
    names = list(tuned.entries())

    def compute(name, chunk):
        values = chunk.tensors["tuned"].clone()
        values[0] += 1e9 if name == names[0] else 1e-3
        return values

    change = LiveTrial(module, {"tuned": tuned}).apply(edit_of(compute))
    assert change.tensors_changed == len(names)


def test_a_tuned_model_without_files_is_backed_up(make_llama):
    aligned, module = make_llama(0), make_llama(1)
    before = values_of(module)
    with LiveTrial(module, {"aligned": LiveSource(aligned), "tuned": LiveSource(module)}) as trial:
        trial.apply(HALF)
        first = values_of(module)
        trial.apply(HALF)
        assert same(values_of(module), first) and not same(first, before)
    assert same(values_of(module), before)


def test_resta_is_tried_with_an_unaligned_model_in_memory(models, make_llama):
    sources, module = models
    tied = module.config.tie_word_embeddings
    before = values_of(module)
    unaligned = LiveSource(make_llama(7, tied=tied))
    with LiveTrial(module, {**sources, "unaligned": unaligned}) as trial:
        assert trial.apply(Resta(RestaConfig(0.5))).relative_norm > 0
    assert same(values_of(module), before)


@pytest.mark.parametrize("loaded_as", [torch.float64, torch.float32, torch.bfloat16])
def test_a_module_cast_when_loaded_is_tried_and_restored_in_its_own_dtype(models, loaded_as):
    sources, module = models
    before = values_of(module.to(loaded_as))
    with LiveTrial(module, sources) as trial:
        trial.apply(HALF)
        assert not same(values_of(module), before)
    assert same(values_of(module), before)


def test_an_adapter_merged_into_another_dtype_is_refused(tmp_path, make_llama, make_lora):
    base = tmp_path / "base"
    make_llama().save_pretrained(base)
    opened = Checkpoint(base)
    tuned = AdaptedCheckpoint(opened, adapters=[read_adapter(make_lora(base, "lora"))])
    with pytest.raises(ModelMismatchError) as caught:
        LiveTrial(make_llama().double(), {"aligned": opened, "tuned": tuned})
    assert "not in the dtype of its checkpoint" in caught.value.problem
    assert caught.value.found == "float64" and "without a dtype" in caught.value.fix


def test_a_tied_tuned_model_cannot_try_an_untied_one(tmp_path, make_llama):
    make_llama(0, tied=False).save_pretrained(tmp_path / "aligned")
    module = make_llama(1, tied=True)
    with pytest.raises(ModelMismatchError, match="ties its output head"):
        LiveTrial(module, {"aligned": Checkpoint(tmp_path / "aligned"), "tuned": LiveSource(module)})


def test_a_tied_aligned_model_is_tried_on_an_untied_one(tmp_path, make_llama):
    make_llama(0, tied=True).save_pretrained(tmp_path / "aligned")
    module = make_llama(1, tied=False)
    aligned = Checkpoint(tmp_path / "aligned")
    head = module.lm_head.weight.detach().clone()
    embedding = aligned.read("model.embed_tokens.weight", 0, head.numel()).view(head.shape)
    with LiveTrial(module, {"aligned": aligned, "tuned": LiveSource(module)}) as trial:
        trial.apply(HALF)
        assert torch.equal(module.lm_head.weight, 0.5 * embedding + 0.5 * head)


def test_another_models_tensors_are_refused(models, memory):
    sources, module = models
    with pytest.raises(ModelMismatchError, match="do not have the same tensors"):
        LiveTrial(module, {**sources, "aligned": memory({"a": torch.ones(2)})})


def test_bad_numbers_in_a_source_are_named_and_undone(models, make_llama):
    sources, module = models
    before = values_of(module)
    spoilt = make_llama(0, tied=module.config.tie_word_embeddings)
    with torch.no_grad():
        spoilt.model.norm.weight[3] = float("inf")
    trial = LiveTrial(module, {**sources, "aligned": LiveSource(spoilt, "models/spoilt")})
    with pytest.raises(NumericalError, match=r"'aligned'.*'model.norm.weight', element 3"), trial:
        trial.apply(HALF)
    assert same(values_of(module), before)


@pytest.fixture
def edit_of():
    """Return an edit of the tuned model alone, made of a function of name and chunk."""

    class Computed(Edit):
        def __init__(self, compute):
            self.compute = compute

        def edit(self, name, chunk, found):
            return self.compute(name, chunk)

    return Computed
