# SPDX-License-Identifier: Apache-2.0
"""Model folders: each kind of folder that was not meant gets the error that says what it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from keelwright.core.errors import ConfigError, DataError, ExitCode, MissingError, UnsafeInputError
from keelwright.models.folders import (
    read_json,
    require_checkpoint,
    require_unquantised,
    shown_files,
)


def folder_of(tmp_path: Path, **files: str) -> Path:
    for name, text in files.items():
        (tmp_path / name.replace("__", ".")).write_text(text)
    return tmp_path


def test_a_folder_without_a_model_says_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(MissingError) as caught:
        require_checkpoint(folder_of(tmp_path, notes__txt="hello", a__csv=""), "my folder")
    assert caught.value.problem == "'my folder' is not a model folder."
    assert caught.value.found == "a.csv, notes.txt"
    assert "pass the folder that holds the weights" in str(caught.value.fix)


def test_an_empty_folder_is_called_empty(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="an empty folder"):
        require_checkpoint(tmp_path, "my folder")


def test_an_adapter_is_told_how_to_be_passed(tmp_path: Path) -> None:
    settings = json.dumps({"base_model_name_or_path": "models/aligned"})
    folder = folder_of(tmp_path, adapter_config__json=settings, adapter_model__safetensors="")
    with pytest.raises(ConfigError) as caught:
        require_checkpoint(folder, "models/lora")
    assert caught.value.problem == "'models/lora' is an adapter, not a full model."
    assert caught.value.fix == "pass it as base+adapter: models/aligned+models/lora"
    assert caught.value.exit_code == ExitCode.BAD_INPUT


@pytest.mark.parametrize("name", ["pytorch_model__bin", "consolidated__00__pth", "model__ckpt"])
def test_pickles_are_unsafe(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsafeInputError) as caught:
        require_checkpoint(folder_of(tmp_path, **{name: ""}), "old model")
    assert "The weights of 'old model' are pickled" in caught.value.problem
    assert caught.value.found == name.replace("__", ".")
    assert "--allow-pickle" in str(caught.value.fix)


def test_safetensors_beside_pickles_are_fine(tmp_path: Path) -> None:
    require_checkpoint(folder_of(tmp_path, pytorch_model__bin="", model__safetensors=""), "both")


def test_gguf_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds GGUF weights"):
        require_checkpoint(folder_of(tmp_path, m__gguf=""), "packed")


CARD = "---\nlicense: mit\nbase_model: org/parent\n---\n# A model\n"


@pytest.mark.parametrize(
    ("card", "config", "parent"),
    [
        (CARD, {}, "org/parent"),
        (CARD.replace("org/parent", "[org/first, org/second]"), {}, "org/first"),
        ("# no front matter", {"_name_or_path": "org/other"}, "org/other"),
        ("---\n: [\n---\n", {}, "that it was made from"),
        (None, {}, "that it was made from"),
    ],
)
def test_quantised_weights_are_refused_with_their_parent(
    tmp_path: Path, card: str | None, config: dict[str, str], parent: str
) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    with pytest.raises(DataError) as caught:
        require_unquantised(tmp_path, {**config, "quantization_config": {"quant_method": "gptq"}}, "small")
    assert "'small' is quantised" in caught.value.problem
    assert caught.value.found == "quantization_config with method 'gptq'"
    assert str(caught.value.fix).endswith(parent)


def test_plain_weights_pass(tmp_path: Path) -> None:
    require_unquantised(tmp_path, {"quantization_config": None}, "small")


@pytest.mark.parametrize(("text", "kind"), [("{", DataError), ("[]", DataError), (None, MissingError)])
def test_settings_that_cannot_be_read_are_named(tmp_path: Path, text: str | None, kind: type[Exception]) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(kind, match=r"config\.json"):
        read_json(tmp_path / "config.json", "model")


def test_long_lists_of_files_are_cut(tmp_path: Path) -> None:
    assert shown_files(folder_of(tmp_path, **{f"f{index}": "" for index in range(9)})).endswith("f5 and 3 more")
