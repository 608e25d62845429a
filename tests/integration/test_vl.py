# SPDX-License-Identifier: Apache-2.0
"""`repair vl` on models of two architectures: written, loaded by transformers, compared with the language model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from keelwright.core.errors import ConfigError, ModelMismatchError
from keelwright.models.checkpoint import Checkpoint
from keelwright.models.loading import load
from keelwright.models.names import tied_tensors
from keelwright.models.stacks import EMBEDDING, HEAD, canonical_names, text_name
from keelwright.models.vision import load_vision
from keelwright.repair.materialise import repair
from keelwright.weights.lock import verify

TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WORDS = ["<pad>", "<bos>", "<end>", "<unk>", *"abcdefghijklmnop"]
SEEN = ["<image>", "<video>", "<look>"]
TOKENS, ROWS = len(WORDS), len(WORDS) + len(SEEN)
PROCESSOR = '{"image_processor_type": "CLIPImageProcessor"}\n'
IDS = torch.tensor([[1, 5, 9, 4, 12, 7]])


def _tokenizer(folder: Path, *added: str) -> None:
    core = Tokenizer(WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<end>", unk_token="<unk>"
    )
    tokenizer.add_tokens([AddedToken(one, special=True) for one in added], special_tokens=True)
    tokenizer.chat_template = "{{ messages[0]['content'] }}" + ("<end>" if added else "")
    tokenizer.save_pretrained(folder)


def _drawn(module: PreTrainedModel, seed: int) -> PreTrainedModel:
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random))
    return module.eval()


def _text(family: str, folder: Path, *, tied: bool = False, seed: int = 1, **settings: Any) -> PreTrainedModel:
    kinds = {"llava": (LlamaConfig, LlamaForCausalLM), "qwen": (Qwen2Config, Qwen2ForCausalLM)}
    config, kind = kinds[family]
    module = _drawn(kind(config(**TEXT, vocab_size=TOKENS, tie_word_embeddings=tied, **settings)), seed)
    module.save_pretrained(folder)
    _tokenizer(folder)
    return module


def _llava(tied: bool) -> LlavaForConditionalGeneration:
    eyes = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = LlamaConfig(**TEXT, vocab_size=ROWS, tie_word_embeddings=tied)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=eyes, text_config=text, image_token_index=TOKENS, tie_word_embeddings=tied)
    )


def _qwen(tied: bool) -> Qwen2_5_VLForConditionalGeneration:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    eyes = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
        "patch_size": 4,
    }
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={**TEXT, "vocab_size": ROWS, "rope_parameters": rope},
            vision_config=eyes,
            image_token_id=TOKENS,
            video_token_id=TOKENS + 1,
            vision_start_token_id=TOKENS + 2,
            vision_end_token_id=TOKENS + 2,
            tie_word_embeddings=tied,
        )
    )


def _vision(
    family: str,
    folder: Path,
    text: PreTrainedModel,
    *,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Path:
    """Save a vision-language model whose text stack is near that of the language model."""
    module = _drawn({"llava": _llava, "qwen": _qwen}[family](tied), 5)
    parent = text.state_dict()
    with torch.no_grad():
        for name, value in module.named_parameters():
            own = text_name(name)
            if own is not None:
                rows = parent[own].shape[0]
                value[:rows] = parent[own] + 0.1 * value[:rows]
    module.to(dtype).save_pretrained(folder, **settings)
    _tokenizer(folder, *SEEN)
    (folder / "preprocessor_config.json").write_text(PROCESSOR)
    return folder


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {name: one for file in folder.glob("*.safetensors") for name, one in load_file(file).items()}


def _canonical(folder: Path) -> dict[str, Tensor]:
    """Return the weights by the names of the current class."""
    source = Checkpoint(folder)
    names = canonical_names(source.entries(), source.config_json())
    return {names[name]: one for name, one in _tensors(folder).items()}


def _renamed(folder: Path, out: Path, rename: Callable[[str], str]) -> Path:
    shutil.copytree(folder, out)
    save_file(
        {rename(name): one for name, one in _tensors(folder).items()}, out / "model.safetensors", {"format": "pt"}
    )
    return out


def _namings(folder: Path, place: Path) -> dict[str, Path]:
    source = Checkpoint(folder)
    names = canonical_names(source.entries(), source.config_json())

    def old(name: str) -> str:
        current = names[name]
        if current == HEAD:
            return "language_model.lm_head.weight"
        return current.replace("model.language_model.", "language_model.model.").replace("model.vision", "vision")

    ways = {"current": names.__getitem__, "old": old, "plain": lambda name: text_name(names[name]) or names[name]}
    return {way: _renamed(folder, place / way, rename) for way, rename in ways.items()}


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype is other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("family", ["llava", "qwen"])
@pytest.mark.parametrize("coefficient", [0.0, 0.4, 1.0])
def test_the_output_loads_and_keeps_what_is_the_donors(family: str, coefficient: float, tmp_path: Path) -> None:
    text = _text(family, tmp_path / "safe")
    donor = _vision(family, tmp_path / "seeing", text)
    repair("vl", aligned=tmp_path / "safe", tuned=donor, coefficient=coefficient, out=tmp_path / "out", offline=True)
    before, after = _canonical(donor), _canonical(tmp_path / "out")
    assert before.keys() == after.keys()
    parent = text.state_dict()
    for name, value in after.items():
        own = text_name(name)
        if own is None or coefficient == 1.0:
            assert _equal(value, before[name])
            continue
        rows = parent[own].shape[0]
        assert _equal(value[rows:], before[name][rows:])
        expected = coefficient * before[name][:rows] + (1.0 - coefficient) * parent[own]
        assert torch.allclose(value[:rows], expected, atol=1e-6)
        assert coefficient or _equal(value[:rows], parent[own])
    assert verify(tmp_path / "out")["files"] > 3
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == PROCESSOR
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (donor / "tokenizer.json").read_bytes()
    load_vision(tmp_path / "out", offline=True)


@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_at_coefficient_zero_text_alone_is_answered_as_by_the_safe_model(family: str, tmp_path: Path) -> None:
    text = _text(family, tmp_path / "safe")
    donor = _vision(family, tmp_path / "seeing", text)
    repair("vl", aligned=tmp_path / "safe", tuned=donor, coefficient=0.0, out=tmp_path / "out", offline=True)
    safe = load(tmp_path / "safe", dtype=torch.float32, offline=True).module
    seeing, unrepaired = (load_vision(one, offline=True).module for one in (tmp_path / "out", donor))
    with torch.no_grad():
        wanted = safe(IDS).logits
        found, other = (one(IDS).logits[..., :TOKENS] for one in (seeing, unrepaired))
    assert torch.allclose(found, wanted, atol=1e-5)
    assert not torch.allclose(other, wanted, atol=1e-2)


def test_a_picture_is_still_seen(tmp_path: Path) -> None:
    text = _text("llava", tmp_path / "safe")
    donor = _vision("llava", tmp_path / "seeing", text)
    repair("vl", aligned=tmp_path / "safe", tuned=donor, coefficient=0.0, out=tmp_path / "out", offline=True)
    module = load_vision(tmp_path / "out", offline=True).module
    ids = torch.cat([torch.full((1, 4), TOKENS), IDS], dim=1)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        one, other = (
            module(input_ids=ids, pixel_values=torch.randn(1, 3, 8, 8, generator=random)).logits for _ in range(2)
        )
    assert torch.isfinite(one).all()
    assert not torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_three_namings_of_one_model_give_one_result(family: str, tmp_path: Path) -> None:
    text = _text(family, tmp_path / "safe")
    copies = _namings(_vision(family, tmp_path / "seeing", text), tmp_path)
    assert len({frozenset(_tensors(folder)) for folder in copies.values()}) == 3
    results = []
    for way, folder in copies.items():
        out = tmp_path / f"out-{way}"
        repair("vl", aligned=tmp_path / "safe", tuned=folder, coefficient=0.4, out=out, offline=True)
        assert _tensors(out).keys() == _tensors(folder).keys()
        results.append(_canonical(out))
    for found in results[1:]:
        assert found.keys() == results[0].keys()
        assert all(_equal(found[name], results[0][name]) for name in found)


def test_shards_and_dtypes_do_not_matter(tmp_path: Path) -> None:
    text = _text("llava", tmp_path / "safe")
    single = _vision("llava", tmp_path / "single", text, dtype=torch.bfloat16)
    sharded = _vision("llava", tmp_path / "sharded", text, dtype=torch.bfloat16, max_shard_size="4KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    for name, donor in (("a", single), ("b", sharded)):
        repair("vl", aligned=tmp_path / "safe", tuned=donor, coefficient=0.4, out=tmp_path / name, offline=True)
    one, other = _canonical(tmp_path / "a"), _canonical(tmp_path / "b")
    assert {value.dtype for value in one.values()} == {torch.bfloat16}
    assert one.keys() == other.keys()
    assert all(_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("text_tied", [False, True])
@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_heads_tied_on_either_side(family: str, text_tied: bool, tmp_path: Path) -> None:
    text = _text(family, tmp_path / "safe", tied=text_tied)
    donor = _vision(family, tmp_path / "seeing", text, tied=not text_tied)
    repair("vl", aligned=tmp_path / "safe", tuned=donor, coefficient=0.0, out=tmp_path / "out", offline=True)
    module = load_vision(tmp_path / "out", offline=True).module
    with torch.no_grad():
        found = module(IDS).logits[..., :TOKENS]
        assert torch.allclose(found, text(IDS).logits, atol=1e-5)
    assert module.get_output_embeddings().weight is not module.get_input_embeddings().weight
    kept = _canonical(donor)["model.language_model.embed_tokens.weight"][TOKENS:]
    assert torch.equal(module.get_input_embeddings().weight[TOKENS:], kept)
    if not text_tied:
        assert torch.equal(module.get_output_embeddings().weight[TOKENS:], kept)


@pytest.mark.parametrize("family", ["llava", "qwen"])
@pytest.mark.parametrize("tied", [True, False])
def test_ties_are_told_in_the_spelling_of_the_checkpoint(family: str, tied: bool, tmp_path: Path) -> None:
    text = _text(family, tmp_path / "safe", tied=tied)
    donor = _vision(family, tmp_path / "seeing", text, tied=tied)
    for folder in (donor, *_namings(donor, tmp_path).values()):
        source = Checkpoint(folder)
        pairs = tied_tensors(source.config_json(), source.entries())
        assert len(pairs) == tied
        assert all(name in source.entries() and text_name(name) == EMBEDDING for name in pairs.values())
        assert all(name not in source.entries() for name in pairs)


def test_a_tie_on_both_sides_stays(tmp_path: Path) -> None:
    text = _text("llava", tmp_path / "safe", tied=True)
    donor = _vision("llava", tmp_path / "seeing", text, tied=True)
    repair("vl", aligned=tmp_path / "safe", tuned=donor, coefficient=0.3, out=tmp_path / "out", offline=True)
    assert _tensors(tmp_path / "out").keys() == _tensors(donor).keys()
    module = load_vision(tmp_path / "out", offline=True).module
    assert module.get_output_embeddings().weight is module.get_input_embeddings().weight


def test_another_model_than_the_parent_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    text = _text("llava", tmp_path / "safe")
    donor = _vision("llava", tmp_path / "seeing", text)
    _text("llava", tmp_path / "stranger", seed=9)
    _text("llava", tmp_path / "deeper", attention_bias=True)
    turned = json.loads((tmp_path / "safe" / "config.json").read_text())
    shutil.copytree(tmp_path / "safe", tmp_path / "turned")
    turned["rope_parameters"] = {"rope_type": "default", "rope_theta": 500000.0}
    (tmp_path / "turned" / "config.json").write_text(json.dumps(turned))
    for name, words in (
        ("stranger", "do not look like parent and child"),
        ("deeper", "do not cover each other"),
        ("turned", "compute differently from the same weights"),
    ):
        with pytest.raises(ModelMismatchError, match=words):
            repair("vl", aligned=tmp_path / name, tuned=donor, coefficient=0.5, out=tmp_path / "out", offline=True)
        assert not (tmp_path / "out").exists()


def test_several_coefficients_come_from_one_reading(tmp_path: Path) -> None:
    text = _text("qwen", tmp_path / "safe")
    donor = _vision("qwen", tmp_path / "seeing", text)
    repair("vl", aligned=tmp_path / "safe", tuned=donor, coefficient=[0.25, 0.75], out=tmp_path / "out", offline=True)
    for value in (0.25, 0.75):
        repair("vl", aligned=tmp_path / "safe", tuned=donor, coefficient=value, out=tmp_path / f"{value}", offline=True)
        one, other = _tensors(tmp_path / "out" / f"coefficient-{value:g}"), _tensors(tmp_path / f"{value}")
        assert all(_equal(one[name], other[name]) for name in other)


def test_with_a_reference_the_safety_vector_is_added(tmp_path: Path) -> None:
    ancestor = _text("llava", tmp_path / "ancestor")
    donor = _vision("llava", tmp_path / "seeing", ancestor)
    safe = _text("llava", tmp_path / "safe")
    with torch.no_grad():
        for value in safe.parameters():
            value.mul_(1.1)
    safe.save_pretrained(tmp_path / "safe")
    repair(
        "vl", aligned=tmp_path / "safe", reference=tmp_path / "ancestor", tuned=donor, coefficient=-0.5,
        out=tmp_path / "out", offline=True,
    )  # fmt: skip
    before, after = _canonical(donor), _canonical(tmp_path / "out")
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    own = text_name(name) or ""
    expected = before[name] + 1.5 * (safe.state_dict()[own] - ancestor.state_dict()[own])
    assert torch.allclose(after[name], expected, atol=1e-6)
    assert EMBEDDING in safe.state_dict()


def test_models_in_memory_are_taken_too(tmp_path: Path) -> None:
    text = _text("llava", tmp_path / "safe")
    donor = _vision("llava", tmp_path / "seeing", text)
    live = load_vision(donor, offline=True)
    repair("vl", aligned=tmp_path / "safe", tuned=live, coefficient=0.4, out=tmp_path / "live", offline=True)
    repair("vl", aligned=tmp_path / "safe", tuned=donor, coefficient=0.4, out=tmp_path / "out", offline=True)
    one, other = _canonical(tmp_path / "live"), _canonical(tmp_path / "out")
    assert one.keys() == other.keys()
    assert all(_equal(one[name], other[name]) for name in one)


def test_the_command_writes_and_explains_and_has_no_search(tmp_path: Path, keelwright: Any) -> None:
    text = _text("llava", tmp_path / "safe")
    _vision("llava", tmp_path / "seeing", text)
    models = ("--tuned", "seeing", "--aligned", "safe")
    told = keelwright("repair", "vl", *models, "--explain", "--json", cwd=tmp_path).stdout
    rows = dict(json.loads(told)["plan"])
    assert rows["language_model.model.layers.*.mlp.up_proj.weight"].startswith("computed")
    assert any("copied from tuned" in what for name, what in rows.items() if name.startswith("multi_modal_projector"))
    done = keelwright("repair", "vl", *models, "--coefficient", "0.4", "--out", "out", cwd=tmp_path)
    assert "safety not evaluated" in done.stdout
    assert "3 rows of the vocabulary" in done.stderr
    refused = keelwright(
        "repair", "vl", *models, "--coefficient", "auto", "--no-utility", "--out", "searched", cwd=tmp_path, code=2
    )
    assert "'vl' cannot take part in heal" in refused.stderr
    assert "no setting that heal could search" in refused.stderr
    assert not (tmp_path / "searched").exists()


def test_a_coefficient_beyond_its_range_says_what_would_allow_it(tmp_path: Path) -> None:
    text = _text("llava", tmp_path / "safe")
    donor = _vision("llava", tmp_path / "seeing", text)
    with pytest.raises(ConfigError, match="--reference"):
        repair("vl", aligned=tmp_path / "safe", tuned=donor, coefficient=-0.5, out=tmp_path / "out", offline=True)
