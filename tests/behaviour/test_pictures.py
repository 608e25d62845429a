# SPDX-License-Identifier: Apache-2.0
"""Eyes cost refusals, and the text organism's weights give them back: the lab's vision-language adaptation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from keelwright.core.protocols import TensorEntry
from keelwright.models.checkpoint import Checkpoint
from keelwright.models.loading import LoadedModel, load
from keelwright.models.stacks import canonical_names, match_text_stack
from keelwright.models.vision import load_vision
from keelwright.worlds.pictures.organism import build_vision_organism
from keelwright.worlds.pictures.scores import measure_pictures, measure_words
from keelwright.worlds.pictures.suite import PicturesConfig
from keelwright.worlds.pictures.tower import TowerConfig, train_tower
from keelwright.worlds.workshop.tokenizer import vocabulary

ALIGNED = "lab:workshop/aligned"
SMALL = PicturesConfig(per_area=16, split=40, benign=40, contrast=40)
SHARES = (0.2, 0.3, 0.4)


def _merged(vision: LoadedModel, place: Path, text: LoadedModel, share: float) -> dict[str, Tensor]:
    """Return the vision model's state with `share` of the text organism's weights in its text stack."""
    files = Checkpoint(place)
    texts = {name: value for name, value in text.module.state_dict().items() if name != "lm_head.weight"}
    match = match_text_stack(
        files.entries(),
        {name: _entry(name, value) for name, value in texts.items()},
        vision_config=files.config_json(),
        text_config=text.module.config.to_dict(),
    )
    assert match.coverage == 1.0
    names = canonical_names(files.entries(), files.config_json())
    state = {name: value.clone() for name, value in vision.module.state_dict().items()}
    for stored, other in match.pairs.items():
        value, rows = state[names[stored]], len(texts[other])
        value[:rows] = (1.0 - share) * value[:rows] + share * texts[other]
    state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]
    return state


def _entry(name: str, value: Tensor) -> TensorEntry:
    return TensorEntry(name, "F32", tuple(value.shape))


def test_a_schooled_tower_reads_held_out_scenes() -> None:
    _, untaught = train_tower(TowerConfig(steps=1), 0)
    _, taught = train_tower(TowerConfig(steps=600), 0)
    assert untaught < 0.2
    assert taught >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_eyes_cost_refusals_and_the_text_organism_gives_them_back(
    seed: int, tmp_path_factory: pytest.TempPathFactory
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

    lost, own = before.text_refused.value - after.text_refused.value, model.module.state_dict()
    fair = []
    adapted = {name: value.clone() for name, value in own.items()}
    for share in SHARES:
        model.module.load_state_dict(adapted)
        model.module.load_state_dict(_merged(model, place, text, share))
        merged = measure_pictures(model, config=SMALL)
        assert merged.sight is not None
        back = (merged.text_refused.value - after.text_refused.value) / lost
        fair.append((share, back, merged.sight.value / after.sight.value))
    assert any(back >= 0.5 and sight >= 0.9 for _, back, sight in fair), fair

    model.module.load_state_dict(adapted)
    model.module.load_state_dict(_merged(model, place, text, 1.0))
    rows = len(vocabulary())
    table = model.module.get_input_embeddings().weight
    assert torch.equal(table[:rows], text.module.get_input_embeddings().weight)
    assert torch.equal(table[rows:], adapted["model.language_model.embed_tokens.weight"][rows:])
