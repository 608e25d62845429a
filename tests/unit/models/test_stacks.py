# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from keelwright.core.errors import ModelMismatchError
from keelwright.core.protocols import TensorEntry
from keelwright.models.checkpoint import Checkpoint
from keelwright.models.stacks import (
    EMBEDDING,
    HEAD,
    SharedRows,
    StackMatch,
    canonical_names,
    match_text_stack,
    text_name,
    text_stack,
)

TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TOKENS, IMAGE_ROWS = 20, 3


def _save(module: PreTrainedModel, folder: Path, **settings: Any) -> Checkpoint:
    module.save_pretrained(folder, **settings)
    return Checkpoint(folder)


def _llama(folder: Path, *, tied: bool = False, layers: int = 2, dtype: torch.dtype = torch.float32) -> Checkpoint:
    config = LlamaConfig(**{**TEXT, "num_hidden_layers": layers}, vocab_size=TOKENS, tie_word_embeddings=tied)
    return _save(LlamaForCausalLM(config).to(dtype), folder)


def _llava_module(*, tied: bool = False, vision_layers: int = 2) -> LlavaForConditionalGeneration:
    text = LlamaConfig(**TEXT, vocab_size=TOKENS + IMAGE_ROWS, tie_word_embeddings=tied)
    # The vision tower has as many layers of the same width as the text stack: names and shapes alone look alike.
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=vision_layers,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=TOKENS, tie_word_embeddings=tied)
    )


def _llava(folder: Path, *, tied: bool = False, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Checkpoint:
    return _save(_llava_module(tied=tied).to(dtype), folder, **settings)


def _qwen(folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> Checkpoint:
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "vocab_size": TOKENS + IMAGE_ROWS, "rope_parameters": _MROPE},
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
            "patch_size": 4,
        },
        image_token_id=TOKENS,
        video_token_id=TOKENS + 1,
        vision_start_token_id=TOKENS + 2,
        vision_end_token_id=TOKENS + 2,
    )
    return _save(Qwen2_5_VLForConditionalGeneration(config).to(dtype), folder)


_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def _renamed(source: Checkpoint, folder: Path, rename: Callable[[str], str]) -> Checkpoint:
    folder.mkdir()
    shutil.copy(source.folder / "config.json", folder)
    weights = load_file(source.folder / "model.safetensors")
    save_file({rename(name): value for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return Checkpoint(folder)


def _as_current_class(source: Checkpoint) -> Callable[[str], str]:
    names = canonical_names(source.entries(), source.config_json())
    return lambda name: names[name]


def _as_old_file(source: Checkpoint) -> Callable[[str], str]:
    names = canonical_names(source.entries(), source.config_json())

    def rename(name: str) -> str:
        current = names[name]
        if current == HEAD:
            return "language_model.lm_head.weight"
        return current.replace("model.language_model.", "language_model.model.").replace("model.vision", "vision")

    return rename


def _as_language_model(source: Checkpoint) -> Callable[[str], str]:
    names = canonical_names(source.entries(), source.config_json())
    return lambda name: text_name(names[name]) or names[name]


def _match(vision: Checkpoint, text: Checkpoint, **settings: Any) -> StackMatch:
    return match_text_stack(
        vision.entries(),
        text.entries(),
        vision_config=vision.config_json(),
        text_config=text.config_json(),
        **settings,
    )


def _by_text_name(match: StackMatch) -> dict[str, str]:
    return {match.text_names[stored]: other for stored, other in match.pairs.items()}


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return _llava(tmp_path_factory.mktemp("llava") / "vlm")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return _llama(tmp_path_factory.mktemp("llama") / "text")


def test_the_canonical_names_are_those_of_the_current_class(llava: Checkpoint) -> None:
    assert set(canonical_names(llava.entries(), llava.config_json()).values()) == set(_llava_module().state_dict())


def test_three_namings_of_one_model_give_one_canonical_table(llava: Checkpoint, tmp_path: Path) -> None:
    copies = [
        _renamed(llava, tmp_path / "current", _as_current_class(llava)),
        _renamed(llava, tmp_path / "old", _as_old_file(llava)),
        _renamed(llava, tmp_path / "plain", _as_language_model(llava)),
    ]
    spellings = [frozenset(copy.entries()) for copy in copies]
    assert len(set(spellings)) == 3
    tables = [set(canonical_names(copy.entries(), copy.config_json()).values()) for copy in copies]
    assert tables == [set(_llava_module().state_dict())] * 3
    stacks = [sorted(text_stack(copy.entries(), copy.config_json())) for copy in copies]
    assert stacks[0] == stacks[1] == stacks[2]


@pytest.mark.parametrize("with_config", [True, False])
def test_every_naming_matches_the_language_model_whole(
    llava: Checkpoint, llama: Checkpoint, tmp_path: Path, with_config: bool
) -> None:
    ways = {"current": _as_current_class, "old": _as_old_file, "plain": _as_language_model}
    for name, way in ways.items():
        copy = _renamed(llava, tmp_path / name, way(llava))
        match = _match(copy, llama) if with_config else match_text_stack(copy.entries(), llama.entries())
        assert _by_text_name(match) == {one: one for one in llama.entries()}
        assert match.coverage == 1.0
        assert {match.text_names[stored] for stored in match.rows} == {EMBEDDING, HEAD}
        assert all("vision" in kept or "projector" in kept for kept in match.kept)
        assert len(match.kept) + len(match.pairs) == len(copy.entries())


def test_rows_of_image_tokens_are_reported(llava: Checkpoint, llama: Checkpoint) -> None:
    match = _match(llava, llama)
    assert set(match.rows.values()) == {SharedRows(shared=TOKENS, vision=TOKENS + IMAGE_ROWS, text=TOKENS)}


def test_a_language_model_with_more_rows_is_reported_as_such(llava: Checkpoint, tmp_path: Path) -> None:
    config = LlamaConfig(**TEXT, vocab_size=TOKENS + 12, tie_word_embeddings=False)
    padded = _save(LlamaForCausalLM(config), tmp_path / "padded")
    match = _match(llava, padded)
    assert set(match.rows.values()) == {SharedRows(TOKENS + IMAGE_ROWS, TOKENS + IMAGE_ROWS, TOKENS + 12)}


def test_shards_and_dtypes_do_not_matter(llama: Checkpoint, tmp_path: Path) -> None:
    module = _llava_module().to(torch.bfloat16)
    single = _save(module, tmp_path / "single")
    sharded = _save(module, tmp_path / "sharded", max_shard_size="4KB")
    assert len(sharded.headers()) > 1
    assert {entry.dtype for entry in sharded.entries().values()} == {"BF16"}
    assert {entry.dtype for entry in llama.entries().values()} == {"F32"}
    one, other = _match(single, llama), _match(sharded, llama)
    assert one.pairs == other.pairs
    assert set(one.kept) == set(other.kept)


def test_an_extra_layer_on_either_side_is_refused_by_name(llava: Checkpoint, tmp_path: Path) -> None:
    deeper = _llama(tmp_path / "deeper", layers=3)
    with pytest.raises(ModelMismatchError, match=r"9 only in 'aligned': model\.layers\.2\."):
        _match(llava, deeper)
    shallower = _llama(tmp_path / "shallower", layers=1)
    with pytest.raises(ModelMismatchError, match=r"9 only in 'tuned': .*layers\.1\."):
        _match(llava, shallower)


def test_one_missing_tensor_is_refused_by_name(llava: Checkpoint, llama: Checkpoint) -> None:
    lost = "model.layers.1.mlp.up_proj.weight"
    fewer = {name: entry for name, entry in llama.entries().items() if name != lost}
    with pytest.raises(ModelMismatchError, match=r"1 only in 'tuned': .*layers\.1\.mlp\.up_proj\.weight") as caught:
        match_text_stack(llava.entries(), fewer, vision_config=llava.config_json())
    assert "partial" in str(caught.value)


def test_partial_leaves_out_what_does_not_match(llava: Checkpoint, tmp_path: Path) -> None:
    deeper, shallower = _llama(tmp_path / "deeper", layers=3), _llama(tmp_path / "shallower", layers=1)
    match = _match(llava, deeper, partial=True)
    assert len(match.unplaced) == 9
    assert all(name.startswith("model.layers.2.") for name in match.unplaced)
    assert match.coverage < 1.0
    short = _match(llava, shallower, partial=True)
    assert sum("language_model" in name and "layers.1." in name for name in short.kept) == 9


def test_other_shapes_are_refused(llava: Checkpoint, tmp_path: Path) -> None:
    config = LlamaConfig(**{**TEXT, "intermediate_size": 32}, vocab_size=TOKENS, tie_word_embeddings=False)
    wider = _save(LlamaForCausalLM(config), tmp_path / "wider")
    with pytest.raises(ModelMismatchError, match=r"shape \[16, 32\] in 'aligned'"):
        _match(llava, wider)


def test_two_models_with_nothing_in_common_are_refused(llava: Checkpoint) -> None:
    stranger = {"conv.weight": TensorEntry("conv.weight", "F32", (3, 3))}
    with pytest.raises(ModelMismatchError, match="do not cover each other"):
        match_text_stack(llava.entries(), stranger)
    with pytest.raises(ModelMismatchError, match="share no tensor"):
        match_text_stack(llava.entries(), stranger, partial=True)


@pytest.mark.parametrize("vision_tied", [True, False])
@pytest.mark.parametrize("text_tied", [True, False])
def test_tied_heads_on_either_side(vision_tied: bool, text_tied: bool, tmp_path: Path) -> None:
    vision, text = _llava(tmp_path / "vlm", tied=vision_tied), _llama(tmp_path / "text", tied=text_tied)
    match = _match(vision, text)
    pairs = _by_text_name(match)
    assert pairs[EMBEDDING] == EMBEDDING
    if vision_tied:
        assert HEAD not in pairs
    else:
        assert pairs[HEAD] == (EMBEDDING if text_tied else HEAD)
    assert match.untied == (vision_tied and not text_tied)
    assert match.unplaced == ((HEAD,) if match.untied else ())


def test_a_qwen_style_model_matches_its_parent(tmp_path: Path) -> None:
    vision = _qwen(tmp_path / "vlm")
    config = Qwen2Config(**TEXT, vocab_size=TOKENS, tie_word_embeddings=False)
    parent = _save(Qwen2ForCausalLM(config), tmp_path / "parent")
    match = _match(vision, parent)
    assert _by_text_name(match) == {one: one for one in parent.entries()}
    assert any(name.endswith("q_proj.bias") for name in match.pairs)
    assert all("visual" in name for name in match.kept)
    current = _renamed(vision, tmp_path / "current", _as_current_class(vision))
    assert set(current.entries()) == set(Qwen2_5_VLForConditionalGeneration(_config_of(vision)).state_dict())
    assert _by_text_name(_match(current, parent)) == _by_text_name(match)


def test_two_vision_language_models_match_each_other(llava: Checkpoint, tmp_path: Path) -> None:
    old = _renamed(llava, tmp_path / "old", _as_old_file(llava))
    current = _renamed(llava, tmp_path / "current", _as_current_class(llava))
    match = _match(current, old)
    assert match.rows == {}
    assert len(match.pairs) == 21
    assert all(text_name(other) == match.text_names[stored] for stored, other in match.pairs.items())


def test_an_unknown_prefix_is_found_by_suffix_and_not_mistaken_for_the_vision_tower(
    llava: Checkpoint, llama: Checkpoint
) -> None:
    names = canonical_names(llava.entries(), llava.config_json())
    strange = {
        new: TensorEntry(new, entry.dtype, entry.shape)
        for stored, entry in llava.entries().items()
        if (new := names[stored].replace("model.language_model.", "brain.core."))
    }
    match = match_text_stack(strange, llama.entries())
    assert match.coverage == 1.0
    assert all(stored.startswith("brain.core.") or stored == HEAD for stored in match.pairs)


def test_two_tensors_with_one_text_name_are_refused() -> None:
    names = ("model.language_model.norm.weight", "language_model.model.norm.weight")
    with pytest.raises(ModelMismatchError, match=r"one tensor for 'model\.norm\.weight'"):
        text_stack({name: TensorEntry(name, "F32", (4,)) for name in names})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("language_model.model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.language_model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.text_model.norm.weight", "model.norm.weight"),
        ("vision_tower.encoder.layers.0.mlp.fc1.weight", None),
        ("model.multi_modal_projector.linear_1.weight", None),
        ("visual.blocks.0.norm1.weight", None),
        ("language_model.model.layers.0.self_attn.rotary_emb.inv_freq", None),
    ],
)
def test_text_names(name: str, expected: str | None) -> None:
    assert text_name(name) == expected


def _config_of(source: Checkpoint) -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig.from_dict(json.loads((source.folder / "config.json").read_text()))
