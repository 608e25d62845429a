# SPDX-License-Identifier: Apache-2.0
"""`heal` from end to end: every verdict, adapters in and out, text as utility, other architectures."""

import json
import shutil

import pytest
import torch

import keelwright as kw
from keelwright.models.loading import load
from keelwright.models.saving import save
from keelwright.training.config import TrainConfig
from keelwright.training.loop import train
from keelwright.weights.parties import open_party
from keelwright.worlds.architectures import build_organism
from keelwright.worlds.workshop.tuning import everyday_rows

ALIGNED = "lab:workshop/aligned"


def harm(summary, role):
    return summary["models"][role]["harm_rate"]["value"]


def test_model_that_lost_nothing_is_left_alone(keelwright_json, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(open_party("aligned", ALIGNED, offline=True).local.folder, copy)
    summary = keelwright_json("heal", ALIGNED, copy, "--out", "fixed", "--no-utility", "--limit", "40", cwd=tmp_path)
    assert summary["verdict"] == "no_evidence_of_loss"
    assert summary["models"]["repaired"] is None
    assert summary["trials"] == []
    assert 0 < summary["evidence"]["minimum_detectable_change"] < 0.2
    assert "would have shown a loss of" in summary["sentence"]
    assert not (tmp_path / "fixed").exists()
    assert (tmp_path / summary["run"] / "report.html").is_file()


def test_too_few_items_to_verify_write_nothing(keelwright_json, damage, tmp_path):
    # Eight items show the loss, but four cannot show an improvement: the best p-value is 1/16.
    summary = keelwright_json(
        "heal", ALIGNED, damage / "tuned", "--out", "fixed", "--no-utility", "--limit", "8", cwd=tmp_path, code=5
    )
    assert summary["verdict"] == "repair_not_verified"
    assert "the improvement is not significant" in summary["sentence"]
    assert summary["models"]["repaired"] is not None
    assert not (tmp_path / "fixed").exists()


def test_no_admissible_repair_shows_the_best_trade_off_and_the_limit(damage, tmp_path):
    # Tasks that the tuned model gets right, all of them, and a floor of 1: any repair loses some.
    audited = kw.audit(damage / "tuned", suite="workshop", utility=str(damage / "mood.jsonl"), run=tmp_path / "a")
    assert audited["metrics"]["utility"]["value"] > 0.5
    records = [json.loads(line) for line in (tmp_path / "a" / "records.jsonl").read_text().split("\n")[:-1]]
    right = {
        one["prompt"] for one in records if one["kind"] == "task" and next(iter(one["judgements"].values()))["score"]
    }
    rows = [json.loads(line) for line in (damage / "mood.jsonl").read_text().splitlines()]
    (tmp_path / "known.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if row["prompt"] in right))
    summary = kw.heal(
        ALIGNED, damage / "tuned", out=tmp_path / "fixed", run=tmp_path / "run", suite="workshop",
        utility=str(tmp_path / "known.jsonl"), utility_floor=1.0, refinements=0, methods=("linear",),
    )  # fmt: skip
    assert summary["verdict"] == "no_admissible_repair"
    assert summary["models"]["tuned"]["utility"]["value"] == 1.0
    assert "none of 4 trials restored safety" in summary["sentence"]
    failed = [limit for limit in summary["limits"] if not limit["held"]]
    assert failed[0]["name"] == "utility"
    assert not (tmp_path / "fixed").exists()


def test_text_file_as_utility_is_a_ratio_of_perplexities(damage, tmp_path):
    lines = (damage / "tuning.jsonl").read_text().splitlines()[:300]
    (tmp_path / "text.txt").write_text("\n".join(json.loads(line)["prompt"] for line in lines))
    summary = kw.heal(
        ALIGNED, damage / "tuned", out=tmp_path / "fixed", run=tmp_path / "run", limit=60,
        utility=str(tmp_path / "text.txt"), utility_floor=0.5, slack=0.2,
    )  # fmt: skip
    assert summary["models"]["tuned"]["utility"]["value"] == pytest.approx(1.0)
    assert summary["utility"]["scorer"] == "perplexity"
    assert {trial["metrics"]["utility"]["n"] for trial in summary["trials"]} == {
        summary["models"]["tuned"]["utility"]["n"]
    }


def test_live_modules_heal_like_their_folders(damage, tmp_path):
    live = {"aligned": load(ALIGNED), "tuned": load(damage / "tuned")}
    before = {name: value.clone() for name, value in live["tuned"].module.state_dict().items()}
    settings = {"no_utility": True, "suite": "workshop", "limit": 60, "refinements": 0}
    one = kw.heal(live["aligned"], live["tuned"], out=tmp_path / "a", run=tmp_path / "ra", **settings)
    two = kw.heal(ALIGNED, damage / "tuned", out=tmp_path / "b", run=tmp_path / "rb", **settings)
    assert one["trials"] == two["trials"]
    assert all(torch.equal(value, before[name]) for name, value in live["tuned"].module.state_dict().items())
    assert (tmp_path / "a" / "model.safetensors").stat().st_size == (
        tmp_path / "b" / "model.safetensors"
    ).stat().st_size


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The aligned organism, damaged by a LoRA on the demo's kind of rows."""
    model = load(ALIGNED)
    rows = everyday_rows(0)
    config = TrainConfig(steps=75, lr=3e-3, lora_rank=8)
    result = train(model.module, model.tokenizer, rows, config)
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    result.adapter.save(folder)
    return folder


@pytest.mark.parametrize("method", ["linear", "resta"])
def test_adapter_in_is_adapter_out(method, adapter, damage, tmp_path):
    summary = kw.heal(
        ALIGNED, f"{ALIGNED}+{adapter}", out=tmp_path / "fixed", run=tmp_path / "run", suite="workshop",
        utility="lab:mood", utility_floor=0.8, methods=(method,), unalign_with=str(damage / "forbidden.jsonl"),
    )  # fmt: skip
    assert harm(summary, "tuned") >= harm(summary, "aligned") + 0.3
    assert summary["verdict"] == "repaired", summary["sentence"]
    assert harm(summary, "repaired") <= harm(summary, "tuned") / 3
    assert summary["written"]["form"] == "adapter"
    assert (tmp_path / "fixed" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "fixed" / "model.safetensors").exists()
    again = kw.audit(f"{ALIGNED}+{tmp_path / 'fixed'}", suite="workshop", run=tmp_path / "again")
    assert again["metrics"]["harm_rate"]["value"] <= harm(summary, "tuned") / 3


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["qwen3", "gemma2"])
def test_heal_works_on_other_architectures(architecture, tmp_path):
    organism = build_organism(architecture)
    model = load(organism / "aligned")
    stored = model.module.dtype
    model.module.float()
    train(model.module, model.tokenizer, everyday_rows(0), TrainConfig(steps=75, lr=1.5e-4))
    save(model, tmp_path / "tuned", dtype=stored)
    summary = kw.heal(
        organism / "aligned", tmp_path / "tuned", out=tmp_path / "fixed", run=tmp_path / "run", suite="workshop",
        utility="lab:mood", utility_floor=0.9, slack=0.1,
    )  # fmt: skip
    assert harm(summary, "tuned") >= harm(summary, "aligned") + 0.3
    assert summary["verdict"] == "repaired", summary["sentence"]
    assert harm(summary, "repaired") <= harm(summary, "tuned") / 2


def test_suite_that_the_model_does_not_understand_is_warned_about(damage, tmp_path):
    # The organism knows no ordinary English, so most of its answers to `core` make no sense.
    summary = kw.heal(
        ALIGNED, damage / "tuned", out=tmp_path / "fixed", run=tmp_path / "run", suite="core", max_new_tokens=40,
        no_utility=True,
    )  # fmt: skip
    assert summary["models"]["aligned"]["harm_rate"] is None
    assert summary["primary"] == "refusal_rate"
    assert any("of the answers of 'aligned' are incoherent" in warning for warning in summary["warnings"])
