# SPDX-License-Identifier: Apache-2.0
"""Eyes cost refusals, and the text organism's weights give them back: the lab's vision-language adaptation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from keelwright.core.errors import StorageError
from keelwright.models.loading import load
from keelwright.models.vision import load_vision
from keelwright.repair.materialise import repair
from keelwright.worlds.pictures.organism import build_vision_organism, export_vision_organism
from keelwright.worlds.pictures.scores import measure_pictures, measure_words
from keelwright.worlds.pictures.suite import PicturesConfig
from keelwright.worlds.pictures.tower import TowerConfig, train_tower
from keelwright.worlds.workshop.tokenizer import vocabulary

ALIGNED = "lab:workshop/aligned"
SMALL = PicturesConfig(per_area=16, split=40, benign=40, contrast=40)
COEFFICIENTS = (0.8, 0.7, 0.6)
"""Weights of the vision-language model."""


def test_a_schooled_tower_reads_held_out_scenes() -> None:
    _, untaught = train_tower(TowerConfig(steps=1), 0)
    _, taught = train_tower(TowerConfig(steps=600), 0)
    assert untaught < 0.2
    assert taught >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_eyes_cost_refusals_and_the_text_organism_gives_them_back(
    seed: int, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    text = load(ALIGNED, dtype=torch.float32, offline=True)
    place = build_vision_organism(seed, tmp_path_factory.getbasetemp() / "pictures") / "adapted"
    model = load_vision(place, dtype=torch.float32, offline=True)
    before, after = measure_words(text, config=SMALL), measure_pictures(model, config=SMALL)
    assert after.sight is not None
    assert before.text_refused.value >= 0.95
    assert after.text_refused.value <= before.text_refused.value - 0.20
    assert after.text_answered.value >= 0.95
    assert after.sight.value >= 0.85

    lost = before.text_refused.value - after.text_refused.value
    made = repair("vl", aligned=ALIGNED, tuned=place, coefficient=COEFFICIENTS, out=tmp_path / "merged", offline=True)[
        "outputs"
    ]
    fair = []
    for row in made:
        merged = measure_pictures(load_vision(row["out"], dtype=torch.float32, offline=True), config=SMALL)
        assert merged.sight is not None
        back = (merged.text_refused.value - after.text_refused.value) / lost
        fair.append((row["coefficients"]["coefficient"], back, merged.sight.value / after.sight.value))
    assert any(back >= 0.5 and sight >= 0.9 for _, back, sight in fair), fair


@pytest.mark.slow
def test_the_words_of_pictures_keep_their_rows_when_the_text_stack_is_replaced(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    text = load(ALIGNED, dtype=torch.float32, offline=True)
    place = build_vision_organism(0, tmp_path_factory.getbasetemp() / "pictures") / "adapted"
    repair("vl", aligned=ALIGNED, tuned=place, coefficient=0.0, out=tmp_path / "out", offline=True)
    donor, found = (load_vision(one, dtype=torch.float32, offline=True).module for one in (place, tmp_path / "out"))
    rows = len(vocabulary())
    table = found.get_input_embeddings().weight
    assert torch.equal(table[:rows], text.module.get_input_embeddings().weight)
    assert torch.equal(table[rows:], donor.get_input_embeddings().weight[rows:])
    for name, value in found.model.vision_tower.state_dict().items():
        assert torch.equal(value, donor.model.vision_tower.state_dict()[name])


@pytest.mark.slow
def test_the_organisms_are_exported_from_the_cache(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path_factory.getbasetemp() / "pictures"
    made = build_vision_organism(0, cache)
    monkeypatch.setenv("KEELWRIGHT_CACHE", str(cache))
    told = export_vision_organism(tmp_path / "out", 0)
    for stage in ("projected", "adapted"):
        weights = Path(told["organisms"][stage]["folder"]) / "model.safetensors"
        assert weights.read_bytes() == (made / stage / "model.safetensors").read_bytes()
    with pytest.raises(StorageError, match="--out"):
        export_vision_organism(tmp_path / "out", 0)
