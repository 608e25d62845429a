# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from keelwright.core.errors import MissingError
from keelwright.core.protocols import TensorEntry
from keelwright.weights.companions import copy_companions, copy_tokenizer, dominant_dtype


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "additional_chat_templates").mkdir(parents=True)
    for name in (
        "generation_config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE.txt", "modeling_x.py",
        "pytorch_model.bin", "README.md", "additional_chat_templates/tool.jinja", "training_args.bin",
    ):  # fmt: skip
        (folder / name).write_text(name)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "float32"}))
    return folder


def test_what_a_loader_needs_is_copied_and_code_pickles_and_cards_stay_behind(model: Path, tmp_path: Path) -> None:
    files = copy_companions(model, model, tmp_path / "out", {})
    assert set(files) == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE.txt",
        "additional_chat_templates/tool.jinja",
    }  # fmt: skip
    for name, digest in files.items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == digest


def test_the_tokenizer_can_come_from_another_folder(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "adapter"
    other.mkdir()
    (other / "tokenizer.json").write_text("its own")
    copy_companions(model, other, tmp_path / "out", {})
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "its own"
    assert not (tmp_path / "out" / "tokenizer_config.json").exists()


def test_changes_replace_keys_of_the_config(model: Path, tmp_path: Path) -> None:
    copy_companions(model, model, tmp_path / "out", {"dtype": "bfloat16", "tie_word_embeddings": False, "gone": None})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"model_type": "llama", "dtype": "bfloat16", "tie_word_embeddings": False}


def test_the_older_spelling_of_the_dtype_is_kept_alone(model: Path, tmp_path: Path) -> None:
    (model / "config.json").write_text(json.dumps({"torch_dtype": "float32"}))
    copy_companions(model, model, tmp_path / "out", {"dtype": "bfloat16"})
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"torch_dtype": "bfloat16"}


def test_a_model_without_config_is_missing_something(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingError, match=r"has no config\.json"):
        copy_companions(tmp_path / "empty", tmp_path / "empty", tmp_path / "out", {})


def test_a_tokenizer_is_copied_alone(model: Path, tmp_path: Path) -> None:
    assert set(copy_tokenizer(model, tmp_path / "out")) == {
        "tokenizer.json", "tokenizer_config.json", "additional_chat_templates/tool.jinja",
    }  # fmt: skip


def test_the_dtype_of_most_weights_counts() -> None:
    entries = [TensorEntry("a", "F32", (3,)), TensorEntry("b", "BF16", (5,)), TensorEntry("c", "I64", (100,))]
    assert dominant_dtype(entries) == "bfloat16"
    assert dominant_dtype(entries[2:]) is None


def test_none_removes_a_key_and_quantisation_is_not_copied(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "pad_token_id": 3, "quantization_config": {"bits": 8}}))
    copy_companions(model, model, tmp_path / "out", {"pad_token_id": None})
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written.keys() & {"pad_token_id", "quantization_config"} == set()
    copy_companions(model, model, tmp_path / "out2", {"quantization_config": {"bits": 8}})
    assert json.loads((tmp_path / "out2" / "config.json").read_text())["quantization_config"] == {"bits": 8}


def test_generation_settings_say_what_changed(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "generation_config.json").write_text('{"eos_token_id": [5, 7], "pad_token_id": 9, "top_p": 0.5}')
    out = tmp_path / "out"
    out.mkdir()
    files = copy_companions(model, model, out, {}, {"eos_token_id": [2], "pad_token_id": None})
    content = (out / "generation_config.json").read_bytes()
    assert json.loads(content) == {"eos_token_id": [2], "top_p": 0.5}
    assert files["generation_config.json"] == hashlib.sha256(content).hexdigest()
