# SPDX-License-Identifier: Apache-2.0
"""Adapters in, adapters out."""

import json
import shutil
from collections import namedtuple

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from keelwright.core.errors import ConfigError, NumericalError, StorageError
from keelwright.models.adapters import AdaptedCheckpoint, LoraFactors, read_adapter
from keelwright.models.checkpoint import Checkpoint
from keelwright.repair.linear import Linear, LinearConfig
from keelwright.repair.resta import Resta, RestaConfig
from keelwright.weights.adapter import adapter_terms, write_adapter
from keelwright.weights.card import Provenance
from keelwright.weights.lock import verify
from keelwright.weights.stream import evaluate

LINEAR = Linear(LinearConfig(0.25))
RESTA = Resta(RestaConfig(0.5))
PROVENANCE = Provenance("linear", coefficients={"coefficient": 0.25})


@pytest.fixture
def base(tmp_path, make_llama):
    make_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapted(base, folder):
    return AdaptedCheckpoint(Checkpoint(base), adapters=[read_adapter(folder)])


def whole(source, name):
    return source.read(name, 0, source.entries()[name].elements).float()


def edited(edit, sources, name):
    entry = sources[edit.roles()[-1]].entries()[name]
    return torch.cat([values for _, values in evaluate(edit, sources, entry)]).float()


def peft_weights(base, folder):
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), folder).merge_and_unload()
    return model.state_dict()


def test_linear_of_a_base_and_its_adapter_scales_the_second_factor_alone(base, make_lora, tmp_path):
    folder = make_lora(base, "lora", use_rslora=True, rank_pattern={"down_proj": 2})
    sources = {"aligned": Checkpoint(base), "tuned": adapted(base, folder)}
    terms = adapter_terms(LINEAR, sources)
    assert [term.weight for term in terms] == [0.25]
    write_adapter(LINEAR, sources, terms, tmp_path / "out", like=folder, provenance=PROVENANCE)
    before, after = (load_file(one / "adapter_model.safetensors") for one in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    for key, one in before.items():
        assert torch.equal(after[key], 0.25 * one if "lora_B" in key else one)
    configs = [json.loads((one / "adapter_config.json").read_text()) for one in (folder, tmp_path / "out")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"down_proj": 1}}],
    ids=["plain", "rslora", "patterns"],
)
def test_what_peft_loads_equals_the_edit_on_full_weights(base, make_lora, tmp_path, settings):
    folder = make_lora(base, "lora", **settings)
    sources = {"aligned": Checkpoint(base), "tuned": adapted(base, folder)}
    write_adapter(LINEAR, sources, adapter_terms(LINEAR, sources), tmp_path / "out", like=folder, provenance=PROVENANCE)
    found = peft_weights(base, tmp_path / "out")
    for name in sources["tuned"].entries():
        torch.testing.assert_close(found[name].flatten(), edited(LINEAR, sources, name), rtol=0, atol=1e-6)


@pytest.mark.parametrize("in_memory", [False, True])
def test_resta_stacks_the_factors_of_both_adapters(base, make_lora, tmp_path, in_memory):
    tuned = make_lora(base, "lora", seed=1, layers_to_transform=[1], exclude_modules=["o_proj"])
    bad = make_lora(base, "bad", seed=2, r=2, use_rslora=True, target_modules=["q_proj", "o_proj"])
    unaligned = adapted(base, bad)
    if in_memory:
        factors = unaligned.adapters[0].factors
        unaligned = AdaptedCheckpoint(
            Checkpoint(base), factors={k: LoraFactors(v.left, v.right, v.scale) for k, v in factors.items()}
        )
    sources = {"aligned": Checkpoint(base), "unaligned": unaligned, "tuned": adapted(base, tuned)}
    terms = adapter_terms(RESTA, sources)
    assert sorted(term.weight for term in terms) == [-0.5, 1.0]
    write_adapter(RESTA, sources, terms, tmp_path / "out", like=tuned, provenance=PROVENANCE)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 5
    found = peft_weights(base, tmp_path / "out")
    for name in sources["tuned"].entries():
        torch.testing.assert_close(found[name].flatten(), edited(RESTA, sources, name), rtol=0, atol=1e-6)
    # Read by our own code, the output is the same model again.
    again = adapted(base, tmp_path / "out")
    for name in again.touched():
        torch.testing.assert_close(whole(again, name), edited(RESTA, sources, name), rtol=0, atol=1e-6)


def test_adding_adapters_is_not_adding_factors(base, make_lora):
    one, two = (read_adapter(make_lora(base, f"l{seed}", seed=seed)) for seed in (1, 2))
    name = next(iter(one.factors))
    first, second = one.factors[name], two.factors[name]
    of_factors = LoraFactors(first.left + second.left, first.right + second.right, first.scale).delta()
    assert not torch.allclose(of_factors, first.delta() + second.delta(), atol=1e-2)


def test_a_term_without_weight_is_dropped_unless_it_is_the_tuned_one(base, make_lora):
    tuned, aligned = make_lora(base, "t", seed=1), make_lora(base, "a", seed=2)
    sources = {"aligned": adapted(base, aligned), "tuned": adapted(base, tuned)}
    assert [term.weight for term in adapter_terms(Linear(LinearConfig(1.0)), sources)] == [1.0]
    assert [term.weight for term in adapter_terms(Linear(LinearConfig(0.0)), sources)] == [1.0, 0.0]


def test_no_adapter_comes_of_full_models_or_of_other_bases(base, make_lora, make_llama, tmp_path):
    folder = make_lora(base, "lora")
    make_llama(seed=9).save_pretrained(tmp_path / "other")
    assert adapter_terms(LINEAR, {"aligned": Checkpoint(base), "tuned": Checkpoint(base)}) is None
    assert adapter_terms(LINEAR, {"aligned": Checkpoint(tmp_path / "other"), "tuned": adapted(base, folder)}) is None


def test_no_adapter_comes_of_an_edit_that_is_no_sum(base, make_lora, flipped):
    sources = {"aligned": Checkpoint(base), "tuned": adapted(base, make_lora(base, "lora"))}
    assert adapter_terms(flipped, sources) is None


def test_adapters_that_replace_tensors_are_scaled_alone_and_not_stacked(base, make_lora, tmp_path):
    saved = make_lora(base, "saved", modules_to_save=["lm_head"])
    tensors = load_file(saved / "adapter_model.safetensors")
    key = next(one for one in tensors if "lm_head" in one)
    tensors[key] = tensors[key] + 1
    save_file(tensors, saved / "adapter_model.safetensors", metadata={"format": "pt"})
    sources = {"aligned": Checkpoint(base), "tuned": adapted(base, saved)}
    write_adapter(LINEAR, sources, adapter_terms(LINEAR, sources), tmp_path / "out", like=saved, provenance=PROVENANCE)
    found = peft_weights(base, tmp_path / "out")["lm_head.weight"].flatten()
    torch.testing.assert_close(found, edited(LINEAR, sources, "lm_head.weight"), rtol=0, atol=1e-6)
    both = {**sources, "unaligned": adapted(base, make_lora(base, "bad", seed=3))}
    assert adapter_terms(RESTA, both) is None


def test_the_folder_has_lock_card_and_digests(base, make_lora, tmp_path):
    folder = make_lora(base, "lora")
    (folder / "tokenizer.json").write_text("{}")
    sources = {"aligned": Checkpoint(base), "tuned": adapted(base, folder)}
    manifest = write_adapter(
        LINEAR, sources, adapter_terms(LINEAR, sources), tmp_path / "out", like=folder, provenance=PROVENANCE
    )
    assert verify(tmp_path / "out")["files"] == len(manifest.files)
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md"} == set(manifest.files)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: peft" in card and "safety not evaluated" in card
    assert not (tmp_path / "out.partial").exists()


def test_an_output_that_is_not_empty_is_left_alone(base, make_lora, tmp_path):
    folder = make_lora(base, "lora")
    sources = {"aligned": Checkpoint(base), "tuned": adapted(base, folder)}
    with pytest.raises(StorageError, match="is not empty"):
        write_adapter(LINEAR, sources, adapter_terms(LINEAR, sources), base, like=folder, provenance=PROVENANCE)


def test_factors_that_are_no_numbers_are_named_and_nothing_is_written(base, make_lora, tmp_path):
    folder = make_lora(base, "lora")
    tensors = load_file(folder / "adapter_model.safetensors")
    key = next(one for one in tensors if "lora_A" in one)
    tensors[key][0, 0] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    sources = {"aligned": Checkpoint(base), "tuned": adapted(base, folder)}
    with pytest.raises(NumericalError) as caught:
        write_adapter(
            LINEAR, sources, adapter_terms(LINEAR, sources), tmp_path / "out", like=folder, provenance=PROVENANCE
        )
    assert key in caught.value.problem
    assert not list(tmp_path.glob("out*"))


KINDS = {
    "dora": lambda: peft.LoraConfig(r=3, target_modules=["q_proj"], use_dora=True),
    "loha": lambda: peft.LoHaConfig(r=3, target_modules=["q_proj"]),
    "ia3": lambda: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    "parameters": lambda: peft.LoraConfig(r=3, target_modules=[], target_parameters=["self_attn.q_proj.weight"]),
    "velora": lambda: peft.LoraConfig(
        r=3, target_modules=["q_proj"], velora_config=peft.tuners.lora.config.VeloraConfig(num_groups=2)
    ),
    "mica": lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="mica"),
    "adalora": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["q_proj", "down_proj"]),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj", "down_proj"], save_projection=True),
}


def of_kind(base, folder, kind, seed=0):
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), KINDS[kind]())
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["dora", "loha", "ia3"])
def test_no_adapter_comes_of_kinds_that_are_no_low_rank_sum(base, make_lora, tmp_path, kind):
    folder = of_kind(base, tmp_path / kind, kind)
    assert adapter_terms(LINEAR, {"aligned": Checkpoint(base), "tuned": adapted(base, folder)}) is None
    mixed = {"aligned": adapted(base, folder), "tuned": adapted(base, make_lora(base, "lora"))}
    assert adapter_terms(LINEAR, mixed) is None


@pytest.mark.parametrize("kind", ["adalora", "vera", "parameters", "velora", "mica"])
def test_kinds_that_are_low_rank_sums_come_out_as_plain_lora(base, make_lora, tmp_path, kind):
    folder = of_kind(base, tmp_path / kind, kind)
    sources = {"aligned": adapted(base, make_lora(base, "lora", seed=4)), "tuned": adapted(base, folder)}
    for index, roles in enumerate(({**sources, "aligned": Checkpoint(base)}, sources)):
        terms = adapter_terms(LINEAR, roles)
        out = tmp_path / f"out{index}"
        write_adapter(LINEAR, roles, terms, out, like=folder, provenance=PROVENANCE)
        config = json.loads((out / "adapter_config.json").read_text())
        assert (config["peft_type"], config["base_model_name_or_path"]) == ("LORA", str(base))
        found = peft_weights(base, out)
        for name in roles["tuned"].entries():
            torch.testing.assert_close(found[name].flatten(), edited(LINEAR, roles, name), rtol=0, atol=1e-6)


def two(base, make_lora):
    return {
        "aligned": adapted(base, make_lora(base, "a", seed=2, r=2)),
        "tuned": adapted(base, make_lora(base, "t", seed=1)),
    }


def test_truncating_to_the_stacked_rank_is_exact(base, make_lora, tmp_path):
    sources = two(base, make_lora)
    write_adapter(
        LINEAR,
        sources,
        adapter_terms(LINEAR, sources),
        tmp_path / "out",
        like=tmp_path / "t",
        provenance=PROVENANCE,
        rank=5,
    )
    found = peft_weights(base, tmp_path / "out")
    for name in sources["tuned"].entries():
        torch.testing.assert_close(found[name].flatten(), edited(LINEAR, sources, name), rtol=0, atol=1e-6)


def test_truncating_says_what_it_costs_and_costs_no_more_than_it_must(base, make_lora, tmp_path):
    sources = two(base, make_lora)
    terms = adapter_terms(LINEAR, sources)
    manifest = write_adapter(
        LINEAR, sources, terms, tmp_path / "out", like=tmp_path / "t", provenance=PROVENANCE, rank=2
    )
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 2
    small = adapted(base, tmp_path / "out")
    lost, best, total = 0.0, 0.0, 0.0
    for name, one in small.adapters[0].factors.items():
        before = whole(Checkpoint(base), name).view(one.shape)
        change = edited(LINEAR, sources, name).view(one.shape) - before
        values = torch.linalg.svdvals(change.double())
        lost += float((change - one.delta()).double().square().sum())
        best += float(values[2:].square().sum())
        total += float(values.square().sum())
    assert lost == pytest.approx(best, rel=1e-4)
    assert f"relative error of the whole change {(lost / total) ** 0.5:.3g}" in manifest.notes[0]
    assert manifest.notes[0].startswith("truncated from rank 5 to rank 2 to 2")
    assert manifest.notes[0] in (tmp_path / "out" / "README.md").read_text()


def test_energy_chooses_the_rank_of_each_matrix(base, make_lora, tmp_path):
    sources = two(base, make_lora)
    terms = adapter_terms(LINEAR, sources)
    errors = []
    for index, energy in enumerate((0.3, 0.8, 0.999)):
        out = tmp_path / f"out{index}"
        write_adapter(LINEAR, sources, terms, out, like=tmp_path / "t", provenance=PROVENANCE, energy=energy)
        lost = total = 0.0
        for name, one in adapted(base, out).adapters[0].factors.items():
            change = edited(LINEAR, sources, name).view(one.shape) - whole(Checkpoint(base), name).view(one.shape)
            part = float((change - one.delta()).square().sum() / change.square().sum())
            assert part <= 1.0 - energy + 1e-5
            lost, total = lost + part, total + 1
        errors.append(lost / total)
    assert errors == sorted(errors, reverse=True)


def test_a_truncated_output_has_a_digest_of_its_own(base, make_lora, tmp_path):
    sources = two(base, make_lora)
    terms = adapter_terms(LINEAR, sources)
    plans = set()
    for index, target in enumerate(({}, {"rank": 2}, {"rank": 3}, {"energy": 0.5})):
        out = tmp_path / f"out{index}"
        write_adapter(LINEAR, sources, terms, out, like=tmp_path / "t", provenance=PROVENANCE, **target)
        plans.add(json.loads((out / "merge.lock.json").read_text())["plan"])
    assert len(plans) == 4


def test_what_cannot_be_truncated_is_refused_before_anything_is_written(base, make_lora, tmp_path):
    saved = make_lora(base, "saved", modules_to_save=["lm_head"])
    sources = {"aligned": Checkpoint(base), "tuned": adapted(base, saved)}
    terms = adapter_terms(LINEAR, sources)
    with pytest.raises(ConfigError, match="cannot be truncated") as caught:
        write_adapter(LINEAR, sources, terms, tmp_path / "out", like=saved, provenance=PROVENANCE, rank=1)
    assert "lm_head.weight" in caught.value.found
    with pytest.raises(ConfigError, match="size of the low-rank output"):
        write_adapter(LINEAR, sources, terms, tmp_path / "out", like=saved, provenance=PROVENANCE, rank=1, energy=0.5)
    assert not list(tmp_path.glob("out*"))


def test_a_disk_without_room_is_named_before_anything_is_written(base, make_lora, tmp_path, monkeypatch):
    folder = make_lora(base, "lora")
    sources = {"aligned": Checkpoint(base), "tuned": adapted(base, folder)}
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 99, 1))
    with pytest.raises(StorageError, match="has too little room"):
        write_adapter(
            LINEAR, sources, adapter_terms(LINEAR, sources), tmp_path / "out", like=folder, provenance=PROVENANCE
        )
    assert not list(tmp_path.glob("out*"))
