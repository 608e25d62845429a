# SPDX-License-Identifier: Apache-2.0
"""Compatibility: whatever differs is found, and the error says which model has what."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from keelwright.core.errors import ModelMismatchError
from keelwright.models.compatibility import compare_models, require_compatible
from keelwright.models.refs import LocalModel, parse_ref, resolve

MakeFolder = Callable[..., Path]
MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


def local(text: str | Path) -> LocalModel:
    return resolve(parse_ref(text), offline=True)


def refused(first: str | Path, second: str | Path, **settings: Any) -> ModelMismatchError:
    with pytest.raises(ModelMismatchError) as caught:
        require_compatible(local(first), local(second), **settings)
    assert caught.value.expected
    assert caught.value.found
    assert caught.value.fix
    return caught.value


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def add_tensors(folder: Path, **tensors: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    save_file({**load_file(path), **tensors}, path, metadata={"format": "pt"})


def test_a_model_and_its_tuned_child_differ_in_values_only(make_folder: MakeFolder) -> None:
    first = local(make_folder(name="aligned"))
    second = local(make_folder(name="tuned", seed=5, shard="10KB"))
    assert compare_models(first, second).is_identical
    assert require_compatible(first, second).is_identical


def test_other_dtypes_are_reported_but_fit(make_folder: MakeFolder) -> None:
    found = require_compatible(
        local(make_folder(name="aligned")), local(make_folder(name="tuned", dtype=torch.bfloat16))
    )
    assert len(found.dtypes) == found.tensors
    assert (found.dtypes[0].first, found.dtypes[0].second) == ("F32", "BF16")
    assert not found.is_identical


def test_an_adapter_on_the_same_base_fits(make_folder: MakeFolder, tmp_path: Path) -> None:
    base = make_folder()
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "lora")
    assert require_compatible(local(base), local(f"{base}+{tmp_path / 'lora'}")).is_identical


def test_other_architectures_are_named_first(make_folder: MakeFolder) -> None:
    error = refused(make_folder("llama"), make_folder("mistral"))
    assert error.problem == "'aligned' and 'tuned' are of different architectures."
    assert "llama" in str(error.expected)
    assert "mistral" in str(error.found)


def test_more_tensors_are_counted_and_named(make_folder: MakeFolder) -> None:
    aligned, tuned = make_folder(name="aligned"), make_folder(name="tuned")
    add_tensors(tuned, **{"model.layers.1.mlp.lora_A": torch.ones(1), "model.layers.1.mlp.lora_B": torch.ones(1)})
    error = refused(aligned, tuned)
    assert error.problem == "'aligned' and 'tuned' do not have the same tensors."
    assert error.expected == f"21 tensors as in 'aligned' ({aligned})"
    assert f"23 in 'tuned' ({tuned}); only in 'tuned': model.layers.1.mlp.lora_A" in str(error.found)
    assert "looks like an adapter: pass it as base+adapter" in str(error.fix)


def test_fewer_layers_are_named(make_folder: MakeFolder) -> None:
    error = refused(make_folder(name="aligned"), make_folder(name="tuned", num_hidden_layers=1))
    assert "only in 'aligned': model.layers.1" in str(error.found)
    assert "and 6 more" in str(error.found)


def test_a_tied_head_that_is_not_stored_is_no_difference(make_folder: MakeFolder) -> None:
    untied = make_folder("llama", name="untied", tie_word_embeddings=False)
    tied = make_folder("llama", name="tied", tie_word_embeddings=True)
    for first, second in ((untied, tied), (tied, untied)):
        found = require_compatible(local(first), local(second))
        assert (found.only_first, found.only_second) == ((), ())
        assert {found.tensors, found.second_tensors} == {20, 21}


def test_other_shapes_are_named_and_added_tokens_guessed(make_folder: MakeFolder) -> None:
    error = refused(make_folder(name="aligned"), make_folder(name="tuned", vocab_size=33))
    assert error.problem == "'aligned' and 'tuned' have tensors of different shapes."
    assert "[32, 32]" in str(error.expected)
    assert "[33, 32]" in str(error.found)
    assert "1 more differ" in str(error.found)
    assert "tokens were added while tuning" in str(error.fix)


def test_settings_that_change_what_weights_compute_are_refused(make_folder: MakeFolder) -> None:
    aligned, tuned = make_folder(name="aligned"), make_folder(name="tuned")
    edit_config(tuned, rms_norm_eps=0.1)
    error = refused(aligned, tuned, roles=("first", "second"))
    assert error.problem == "'first' and 'second' compute differently from the same weights."
    assert "rms_norm_eps 1e-06" in str(error.expected)
    assert f"rms_norm_eps 0.1 in 'second' ({tuned})" in str(error.found)


def test_notes_of_other_programs_are_no_difference(make_folder: MakeFolder) -> None:
    aligned, tuned = make_folder(name="aligned"), make_folder(name="tuned")
    edit_config(tuned, trainer_notes="fast", transformers_version="4.0", use_cache=False, attention_dropout=0.1)
    assert require_compatible(local(aligned), local(tuned)).is_identical


def test_another_token_is_named(make_folder: MakeFolder, make_tokenizer: MakeTokenizer) -> None:
    words = ["the", "cat", "dog"]
    aligned = make_folder(name="aligned", tokenizer=make_tokenizer(words=words))
    tuned = make_folder(name="tuned", tokenizer=make_tokenizer(words=["the", "cow", "dog"]))
    error = refused(aligned, tuned)
    assert error.problem == "'aligned' and 'tuned' have different tokenizers."
    assert error.expected == f"token 'cat': id 8, as in 'aligned' ({aligned})"
    assert error.found == f"absent in 'tuned' ({tuned}); 1 more differ"
    error = refused(aligned, make_folder(name="moved", tokenizer=make_tokenizer(words=["the", "dog", "cat"])))
    assert "id 9" in str(error.found)


def test_another_flag_of_a_token_is_a_difference(make_folder: MakeFolder, make_tokenizer: MakeTokenizer) -> None:
    marked = make_tokenizer()
    marked.add_tokens(["lamp"], special_tokens=True)
    found = compare_models(local(make_folder(name="aligned")), local(make_folder(name="tuned", tokenizer=marked)))
    assert [one.name for one in found.tokens] == ["lamp"]
    assert found.tokens[0].first == "plain"
    assert "special True" in found.tokens[0].second


def test_another_end_token_is_a_difference(make_folder: MakeFolder, make_tokenizer: MakeTokenizer) -> None:
    other = make_tokenizer()
    other.eos_token = "<user>"
    found = compare_models(local(make_folder(name="aligned")), local(make_folder(name="tuned", tokenizer=other)))
    assert ("(eos_token)", "<end>", "<user>") in [(one.name, one.first, one.second) for one in found.tokens]


def test_other_rules_with_the_same_tokens_are_refused(make_folder: MakeFolder, make_tokenizer: MakeTokenizer) -> None:
    error = refused(make_folder(name="aligned"), make_folder(name="tuned", tokenizer=make_tokenizer(adds_bos=True)))
    assert error.problem == "'aligned' and 'tuned' have the same tokens, but split text by different rules."


def test_a_lost_tokenizer_is_a_difference(make_folder: MakeFolder) -> None:
    aligned, tuned = make_folder(name="aligned"), make_folder(name="tuned")
    (tuned / "tokenizer.json").unlink()
    error = refused(aligned, tuned)
    assert "no tokenizer" in str(error.found)


def test_another_chat_template_is_refused_unless_allowed(
    make_folder: MakeFolder, make_tokenizer: MakeTokenizer
) -> None:
    aligned = make_folder(name="aligned")
    tuned = make_folder(name="tuned", tokenizer=make_tokenizer(template="{{ messages[0]['content'] }}"))
    error = refused(aligned, tuned)
    assert error.problem == (
        "'aligned' and 'tuned' have different chat templates; a changed template alone can change safety."
    )
    assert "--allow-template-change" in str(error.fix)
    assert require_compatible(local(aligned), local(tuned), allow_template_change=True).template


def test_a_lost_chat_template_is_a_difference(make_folder: MakeFolder, make_tokenizer: MakeTokenizer) -> None:
    tuned = make_folder(name="tuned", tokenizer=make_tokenizer(template=None))
    assert "template none" in str(refused(make_folder(name="aligned"), tuned).found)
