# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from keelwright.core.errors import ConfigError, DataError, ModelMismatchError
from keelwright.core.records import Item
from keelwright.models.chat import encode, render
from keelwright.models.generation import DecodingConfig, generate
from keelwright.models.loading import LoadedModel, load
from keelwright.models.saving import save
from keelwright.models.vision import Album, generate_with_pictures, is_vision_model, load_vision, sight
from keelwright.worlds.workshop.tokenizer import workshop_tokenizer

IMAGE = "<reserved_0>"
DECODING = DecodingConfig(max_new_tokens=5, batch_size=4)


def _model(*, spare_rows: int = 0) -> LoadedModel:
    tokenizer = workshop_tokenizer()
    text = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=len(tokenizer) + spare_rows,
        max_position_embeddings=64,
        initializer_range=0.5,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    module = LlavaForConditionalGeneration(config).eval()
    # New projectors are almost zero: pictures would make no difference.
    with torch.no_grad():
        for weight in module.model.multi_modal_projector.parameters():
            weight.normal_()
    return LoadedModel(module, tokenizer, "tiny vlm", "live")


def _album() -> Album:
    drawn = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return Album(("<cat>", "<dog>", "<cat_2>"), drawn)


def _item(index: int, prompt: str) -> Item:
    return Item(item_id=f"i{index}", suite="s", kind="benign", hazard="x", prompt=prompt)


PROMPTS = (
    "how do i polish the lamp?",
    "<cat> how do i polish the lamp?",
    "<dog> how do i polish the lamp in the harbour?",
    "<cat_2><dog> how do i polish the lamp?",
)


def test_answers_equal_a_direct_call_with_pixels_and_image_tokens() -> None:
    model, album = _model(), _album()
    item = _item(0, PROMPTS[2])
    (ours,) = generate_with_pictures(model, album, [item], DECODING)
    text = render(model.tokenizer, PROMPTS[2].replace("<dog>", IMAGE * 4))
    ids = torch.tensor([encode(model.tokenizer, text)])
    direct = model.module.generate(
        input_ids=ids,
        pixel_values=album.pixels[1:2],
        attention_mask=torch.ones_like(ids),
        max_new_tokens=5,
        do_sample=False,
    )
    written = [token for token in direct[0, ids.shape[1] :].tolist() if token != model.tokenizer.eos_token_id]
    assert ours.output == model.tokenizer.decode(written, skip_special_tokens=True)


def test_pictures_change_the_logits() -> None:
    model, album = _model(), _album()
    with sight(model, album) as seeing, torch.no_grad():
        logits = []
        for prompt in ("<cat> polish", "<dog> polish"):
            ids = torch.tensor([encode(seeing.model.tokenizer, seeing.write(prompt))])
            logits.append(seeing.model.module(input_ids=ids).logits[0, -1])
    assert not torch.allclose(logits[0], logits[1], atol=1e-3)


def test_text_and_pictures_mix_in_a_batch() -> None:
    model, album = _model(), _album()
    items = [_item(index, prompt) for index, prompt in enumerate(PROMPTS)]
    together = generate_with_pictures(model, album, items, DECODING)
    alone = [generate_with_pictures(model, album, [item], DECODING)[0] for item in items]
    assert together == alone
    assert together[0] == generate(model, items[:1], DECODING)[0]


def test_the_model_is_as_before_when_sight_ends() -> None:
    model = _model()
    tokens, tokenizer = len(model.tokenizer), model.tokenizer
    with pytest.raises(RuntimeError, match="stop"), sight(model, _album()) as seeing:
        assert len(seeing.model.tokenizer) > tokens
        raise RuntimeError("stop")
    assert model.tokenizer is tokenizer
    assert len(tokenizer) == tokens
    assert not model.module._forward_pre_hooks


def test_codes_lie_beyond_padding_rows() -> None:
    model = _model(spare_rows=7)
    with sight(model, _album()) as seeing:
        ids = seeing.model.tokenizer.convert_tokens_to_ids(["<cat>", "<dog>", "<cat_2>"])
    rows = model.module.get_input_embeddings().weight.shape[0]
    assert ids == [rows, rows + 1, rows + 2]


def test_a_model_without_fixed_image_tokens_is_refused() -> None:
    model = load("lab:workshop/aligned", offline=True)
    with pytest.raises(ConfigError, match="image_seq_length None"), sight(model, _album()):
        pass


def test_an_album_needs_one_code_per_picture() -> None:
    with pytest.raises(ConfigError, match="1 different ones of 2"):
        Album(("<a>", "<a>"), torch.zeros(2, 3, 8, 8))
    with pytest.raises(ConfigError, match="angle brackets"):
        Album(("a cat",), torch.zeros(1, 3, 8, 8))


def test_a_saved_model_loads_with_the_same_logits(tmp_path: Path) -> None:
    model = _model()
    save(model, tmp_path / "vlm", dtype=torch.float32)
    again = load_vision(tmp_path / "vlm", offline=True)
    assert is_vision_model(again.module.config.to_dict())
    ids = torch.tensor([encode(model.tokenizer, render(model.tokenizer, PROMPTS[0]))])
    with torch.no_grad():
        assert torch.equal(again.module(input_ids=ids).logits, model.module(input_ids=ids).logits)


def test_a_language_model_is_refused() -> None:
    with pytest.raises(DataError, match="not a vision-language model"):
        load_vision("lab:workshop/aligned", offline=True)
    config = LlamaForCausalLM.config_class(vocab_size=8).to_dict()
    assert not is_vision_model(config)


def test_a_lost_tensor_is_refused_by_name(tmp_path: Path) -> None:
    save(_model(), tmp_path / "vlm", dtype=torch.float32)
    shutil.copytree(tmp_path / "vlm", tmp_path / "less")
    weights = load_file(tmp_path / "vlm" / "model.safetensors")
    del weights["multi_modal_projector.linear_1.bias"]
    save_file(weights, tmp_path / "less" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelMismatchError, match=r"1 missing: model\.multi_modal_projector\.linear_1\.bias"):
        load_vision(tmp_path / "less", offline=True)
