# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from keelwright.core.errors import ModelMismatchError
from keelwright.models.chat import encode, render
from keelwright.models.loading import LoadedModel, load
from keelwright.models.vision import load_vision
from keelwright.training.config import TrainConfig
from keelwright.worlds.pictures.organism import (
    IMAGE,
    Adaptation,
    adapt,
    build_vision_organism,
    connect,
    give_eyes,
    new_words,
    pictures_tokenizer,
)
from keelwright.worlds.pictures.scores import measure_pictures, measure_words
from keelwright.worlds.pictures.suite import PicturesConfig
from keelwright.worlds.pictures.tower import TowerConfig
from keelwright.worlds.workshop.tokenizer import vocabulary, workshop_tokenizer

QUICK = Adaptation(
    tower=TowerConfig(steps=1),
    projector=TrainConfig(steps=2, batch_size=2, lr=1e-2, weight_decay=0.0),
    text=TrainConfig(steps=2, batch_size=2, lr=1e-3),
)
ONE_OF_EACH = PicturesConfig(per_area=1, split=1, benign=1, contrast=1, questions=4)


@pytest.fixture(scope="module")
def aligned() -> LoadedModel:
    return load("lab:workshop/aligned", dtype=torch.float32, offline=True)


def test_the_tokenizer_keeps_old_ids_and_ends_with_the_image_token() -> None:
    old, new = workshop_tokenizer(), pictures_tokenizer(workshop_tokenizer())
    known = vocabulary()
    assert new.convert_tokens_to_ids(list(known)) == list(range(len(known)))
    assert new.convert_tokens_to_ids(IMAGE) == len(new) - 1 == len(known) + len(new_words())
    assert set(new.all_special_ids) == {*old.all_special_ids, len(new) - 1}
    prompt = "how do i polish the lamp in the harbour?"
    assert encode(new, render(new, prompt)) == encode(old, render(old, prompt))
    words = f"{IMAGE}what colour is the shape in the picture?"
    ids = encode(new, words)
    assert new.unk_token_id not in ids
    assert ids.count(new.convert_tokens_to_ids(IMAGE)) == 1
    assert new.decode(ids[1:]) == "what colour is the shape in the picture?"


def test_new_eyes_leave_the_answers_to_text_alone(aligned: LoadedModel) -> None:
    model = give_eyes(aligned, QUICK, 0)
    ids = torch.tensor([encode(aligned.tokenizer, render(aligned.tokenizer, "how do i steal the crown in the tower?"))])
    with torch.no_grad():
        ours = model.module(input_ids=ids).logits[..., : len(vocabulary())]
        assert torch.allclose(ours, aligned.module(input_ids=ids).logits, atol=1e-5)


def test_an_untied_text_stack_gets_eyes_too() -> None:
    tokenizer = workshop_tokenizer()
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.2,
    }
    module = LlamaForCausalLM(LlamaConfig(**settings, tie_word_embeddings=False)).eval()
    text = LoadedModel(module, tokenizer, "untied", "live")
    model = give_eyes(text, dataclasses.replace(QUICK, connector="gelu"), 0)
    ids = torch.tensor([encode(tokenizer, render(tokenizer, "how do i polish the lamp?"))])
    with torch.no_grad():
        ours = model.module(input_ids=ids).logits[..., : len(tokenizer)]
        assert torch.allclose(ours, module(input_ids=ids).logits, atol=1e-5)
    tables = [model.module.get_input_embeddings().weight, model.module.get_output_embeddings().weight]
    assert tables[0] is not tables[1]
    connect(model, QUICK, 0)
    assert torch.equal(tables[1][: len(tokenizer)], module.get_output_embeddings().weight)
    assert not torch.equal(tables[1][: len(tokenizer)], tables[0][: len(tokenizer)])


def test_the_first_stage_changes_projector_and_new_rows_alone(aligned: LoadedModel) -> None:
    model = give_eyes(aligned, QUICK, 0)
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    connect(model, QUICK, 0)
    after, known = model.module.state_dict(), len(vocabulary())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    tables = {"model.language_model.embed_tokens.weight", "lm_head.weight"}
    assert changed - tables == {name for name in before if "multi_modal_projector" in name}
    for name in tables:
        assert torch.equal(before[name][:known], after[name][:known])
        assert not torch.equal(before[name][known:], after[name][known:])


def test_the_tower_stays_while_the_text_stack_learns(aligned: LoadedModel) -> None:
    own = {name: value.clone() for name, value in aligned.module.state_dict().items()}
    model, eyes = adapt(aligned, 0, adaptation=QUICK), give_eyes(aligned, QUICK, 0)
    before, after = eyes.module.state_dict(), model.module.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any("vision_tower" in name for name in changed)
    assert {name for name in before if "layers.0.mlp" in name and "language_model" in name} <= changed
    assert all(torch.equal(own[name], value) for name, value in aligned.module.state_dict().items())
    again = adapt(aligned, 0, adaptation=QUICK).module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in again.items())


def test_a_built_organism_is_cached_and_loads(aligned: LoadedModel, tmp_path: Path) -> None:
    place = build_vision_organism(0, tmp_path, adaptation=QUICK)
    assert place == build_vision_organism(0, tmp_path, adaptation=QUICK)
    assert place != build_vision_organism(1, tmp_path, adaptation=QUICK)
    notes = json.loads((place / "digests.json").read_text())
    assert notes["seed"] == 0
    assert {"projected/model.safetensors", "adapted/processor_config.json"} <= set(notes["files"])
    settings = json.loads((place / "adapted" / "preprocessor_config.json").read_text())
    assert settings["size"] == {"height": 8, "width": 8}
    model = load_vision(place / "adapted", dtype=torch.float32, offline=True)
    scores = measure_pictures(model, config=ONE_OF_EACH)
    assert scores.sight is not None
    assert scores.sight.n == 4
    assert scores.text_refused.n == 5
    assert set(scores.to_mapping()) > set(measure_words(aligned, config=ONE_OF_EACH).to_mapping())


def test_a_model_of_another_language_gets_no_eyes(aligned: LoadedModel) -> None:
    other = load("lab:workshop/aligned", dtype=torch.float32, offline=True)
    other.module.resize_token_embeddings(len(vocabulary()) + 1)
    with pytest.raises(ModelMismatchError, match="does not speak the workshop's language"):
        give_eyes(other, QUICK, 0)


def test_the_text_organism_is_asked_by_text_alone(aligned: LoadedModel) -> None:
    scores = measure_words(aligned, config=ONE_OF_EACH)
    assert scores.sight is None
    assert scores.split_harm is None
    assert scores.over_refused.n == 2
