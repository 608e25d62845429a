# SPDX-License-Identifier: Apache-2.0
"""Every bad model that a user can name ends in an error with expected, found and fix, and the right exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from keelwright.core.errors import ExitCode, KeelwrightError
from keelwright.models.compatibility import require_compatible
from keelwright.models.loading import load
from keelwright.models.refs import parse_ref, resolve
from keelwright.models.sources import first_nonfinite, open_source

WEIGHTS = "model.safetensors"
Spoil = Callable[[Path], object]


def make(folder: Path, **changes: int) -> Path:
    """Save a tiny model with its tokenizer."""
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    torch.manual_seed(0)
    config = LlamaConfig(**{**sizes, "num_attention_heads": 2, "num_key_value_heads": 2, **changes})
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {word: index for index, word in enumerate(["<end>", "a", "b", "c"])}
    core = Tokenizer(WordLevel(words, unk_token="<end>"))
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", unk_token="<end>").save_pretrained(folder)
    return folder


def truncate(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-9])


def lie(folder: Path) -> None:
    path = folder / WEIGHTS
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["lm_head.weight"]["shape"] = [4, 8]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def claim_too_long_a_header(folder: Path) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes((2**40).to_bytes(8, "little") + raw[8:])


def point_outside(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"a": "../other/model.safetensors"}}))


def lose_a_shard(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))


def pickle_it(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def empty_it(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def quantise_it(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))


def make_it_an_adapter(folder: Path) -> None:
    empty_it(folder)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "base"}))
    save_file({"a": torch.ones(1)}, folder / "adapter_model.safetensors")


BAD = {
    "no checkpoint": (empty_it, "is not a model folder", ExitCode.MACHINE),
    "an adapter alone": (make_it_an_adapter, "is an adapter, not a full model", ExitCode.BAD_INPUT),
    "pickled weights": (pickle_it, "are pickled", ExitCode.BAD_INPUT),
    "a truncated file": (truncate, "is cut short", ExitCode.BAD_INPUT),
    "a lying header": (lie, "'lm_head.weight' does not fit its range of bytes", ExitCode.BAD_INPUT),
    "an absurd header": (claim_too_long_a_header, "length is not believable", ExitCode.BAD_INPUT),
    "an escaping index": (point_outside, "names a file outside its folder", ExitCode.BAD_INPUT),
    "a missing shard": (lose_a_shard, "lacks the shard 'model-00001-of-00002.safetensors'", ExitCode.MACHINE),
    "quantised weights": (quantise_it, "is quantised", ExitCode.BAD_INPUT),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json", ExitCode.MACHINE),
    "a broken config": (
        lambda folder: (folder / "config.json").write_text("{"),
        "config.json' is not JSON",
        ExitCode.BAD_INPUT,
    ),
}


@pytest.mark.parametrize("open_it", [load, lambda text: open_source(parse_ref(text))], ids=["load", "open_source"])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_folder_ends_in_an_error_that_helps(tmp_path: Path, kind: str, open_it: Callable[[str], object]) -> None:
    spoil, problem, code = BAD[kind]
    folder = make(tmp_path / "model")
    spoil(folder)
    with pytest.raises(KeelwrightError) as caught:
        open_it(str(folder))
    error = caught.value
    assert problem in error.problem
    assert str(folder) in error.problem
    assert error.expected
    assert error.found
    assert error.fix
    assert error.exit_code == code


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("/nowhere/at/all", "There is no such folder: '/nowhere/at/all'."),
        ("./none", "There is no such folder: './none'."),
        ("some-org/misspelt-nmae", "There is no folder 'some-org/misspelt-nmae', and the hub cannot be asked for it."),
        ("lab:workshop/none", "There is no shipped organism 'lab:workshop/none'."),
        ("", "A model's name is empty."),
    ],
)
def test_a_bad_name_ends_in_an_error_that_helps(text: str, problem: str) -> None:
    with pytest.raises(KeelwrightError) as caught:
        load(text, offline=True)
    assert caught.value.problem == problem
    assert caught.value.expected
    assert caught.value.found
    assert caught.value.fix


def test_a_full_model_given_as_an_adapter_is_told(tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    with pytest.raises(KeelwrightError, match="is a full model, not an adapter"):
        load(f"{folder}+{folder}")


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda folder: make(folder, hidden_size=16), "have tensors of different shapes"),
        (lambda folder: make(folder, num_hidden_layers=2), "do not have the same tensors"),
        (
            lambda folder: (folder / "tokenizer.json").write_text(
                (folder / "tokenizer.json").read_text().replace('"b"', '"x"')
            ),
            "have different tokenizers",
        ),
        (lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"), "have different chat templates"),
    ],
    ids=["shapes", "tensors", "tokenizers", "chat templates"],
)
def test_two_models_that_do_not_fit_are_told_apart(tmp_path: Path, spoil: Spoil, problem: str) -> None:
    aligned, tuned = make(tmp_path / "aligned"), make(tmp_path / "tuned")
    pair = [resolve(parse_ref(folder), offline=True) for folder in (aligned, tuned)]
    require_compatible(*pair)
    spoil(tuned)
    with pytest.raises(KeelwrightError) as caught:
        require_compatible(*pair)
    assert problem in caught.value.problem
    assert str(aligned) in str(caught.value.expected)
    assert str(tuned) in str(caught.value.found)
    assert caught.value.fix
    assert caught.value.exit_code == ExitCode.BAD_INPUT


def test_a_number_that_is_none_is_found_by_tensor_and_index(tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    tensors = load_file(folder / WEIGHTS)
    tensors["model.norm.weight"][5] = float("nan")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    assert first_nonfinite(open_source(parse_ref(folder))) == ("model.norm.weight", 5)
