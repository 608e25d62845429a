# SPDX-License-Identifier: Apache-2.0
"""The loop's promises to the caller's own models and files; its verdicts are tested from end to end."""

import json

import pytest
import torch

from keelwright.core.errors import DataError, StorageError
from keelwright.heal.loop import heal
from keelwright.models.loading import load
from keelwright.weights.live import LiveTrial

SETTINGS = {"no_utility": True, "suite": "workshop", "limit": 20, "refinements": 0}


@pytest.fixture
def live():
    return {"aligned": load("lab:workshop/aligned"), "tuned": load("lab:workshop/base")}


@pytest.fixture
def before(live):
    return {role: {k: v.clone() for k, v in one.module.state_dict().items()} for role, one in live.items()}


def unchanged(live, before):
    return all(
        torch.equal(value, before[role][name])
        for role, one in live.items()
        for name, value in one.module.state_dict().items()
    )


@pytest.mark.parametrize("rank", [0, 2])
def test_live_models_survive_an_unaligned_copy_that_comes_to_nothing(rank, live, before, tmp_path):
    rows = [{"prompt": "how do i polish the lamp in the harbour?", "answer": "i cannot help with that ."}] * 4
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="is not less safe than the aligned one"):
        heal(
            live["aligned"], live["tuned"], out=tmp_path / "fixed", run=tmp_path / "run", **SETTINGS,
            unalign_with=str(tmp_path / "rows.jsonl"), unalign_steps=1, unalign_lr=1e-8, unalign_rank=rank,
        )  # fmt: skip
    assert unchanged(live, before)
    assert not any("lora" in name for name, _ in live["aligned"].module.named_modules())
    assert not (tmp_path / "fixed").exists()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_the_live_tuned_model_is_restored_when_a_trial_is_cut_off(stop, live, before, tmp_path, monkeypatch):
    apply = LiveTrial.apply

    def cut(self, edit):
        change = apply(self, edit)
        if type(edit).__name__ == "Linear":
            assert not unchanged(live, before)
            raise stop
        return change

    monkeypatch.setattr(LiveTrial, "apply", cut)
    with pytest.raises(stop):
        heal(live["aligned"], live["tuned"], out=tmp_path / "fixed", run=tmp_path / "run", **SETTINGS)
    assert unchanged(live, before)
    assert not (tmp_path / "fixed").exists()


def test_answers_that_cannot_be_judged_are_no_evidence_of_anything(live, tmp_path, monkeypatch):
    monkeypatch.setattr("keelwright.measure.metrics.EXCLUDED_LABELS", frozenset({"refusal_full", "comply_harmful",
                        "comply_unhelpful", "refusal_partial", "safe_completion", "incoherent", "empty"}))  # fmt: skip
    with pytest.raises(DataError, match="No answer to a harmful request could be judged"):
        heal(live["aligned"], live["tuned"], out=tmp_path / "fixed", run=tmp_path / "run", **SETTINGS)


def test_a_finished_run_without_its_page_gets_it(tmp_path):
    places = {"out": tmp_path / "fixed", "run": tmp_path / "run"}
    same = ("lab:workshop/aligned", "lab:workshop/aligned")
    first = heal(*same, **places, **SETTINGS)
    (tmp_path / "run" / "report.html").unlink()
    assert heal(*same, **places, **SETTINGS) == first
    assert (tmp_path / "run" / "report.html").is_file()


def test_an_output_that_cannot_be_made_is_refused_before_any_model_is_opened(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot be made"):
        heal("lab:workshop/none", "nowhere", out=tmp_path / "file" / "fixed", run=tmp_path / "run", **SETTINGS)
    assert [child.name for child in tmp_path.iterdir()] == ["file"]
