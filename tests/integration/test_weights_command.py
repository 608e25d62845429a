# SPDX-License-Identifier: Apache-2.0
"""`keelwright weights` and the many forms of `keelwright repair`, as a user types them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from keelwright.cli.app import app

WEIGHTS = "model.safetensors"
BAD, MACHINE = 2, 3
Command = Callable[..., Any]


def make(folder: Path, seed: int, *, layers: int = 2) -> Path:
    """Save a tiny Llama with a tokenizer; other seeds than 0 are tuned from that of seed 0 in their matrices."""
    config = LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=20, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    parent, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, values in model.named_parameters():
            values.copy_(torch.randn(values.shape, generator=parent) * 0.3)
            if seed and "proj" in name:
                change = torch.randn(len(values), 2, generator=own) @ torch.randn(2, values.shape[1], generator=own)
                values.add_(0.01 * change)
    model.save_pretrained(folder)
    words = {word: index for index, word in enumerate(["<pad>", "<bos>", "<end>", "<unk>", *"abcdefgh"])}
    core = Tokenizer(WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `aligned`, `tuned` and `tuned_2`: their matrices differ by rank 2."""
    place = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("aligned", "tuned", "tuned_2")):
        make(place / name, seed)
    return place


@pytest.fixture
def here(models: Path, tmp_path: Path) -> Path:
    """A working folder with those models."""
    for one in models.iterdir():
        (tmp_path / one.name).symlink_to(one)
    return tmp_path


PAIR = ("--aligned", "aligned", "--tuned", "tuned", "--offline")


def weights_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    return found


def refusal(done: Any, *parts: str) -> None:
    assert done.stdout == ""
    for part in ("\n  expected: ", "\n  found:    ", "\n  fix:      ", *parts):
        assert part in done.stderr


def test_info_says_what_a_checkpoint_holds(keelwright: Command, keelwright_json: Command, here: Path) -> None:
    found = keelwright_json("weights", "info", "aligned", "--tensors", cwd=here)
    stored = weights_of(here / "aligned")
    assert found["architecture"] == "LlamaForCausalLM"
    assert found["tensors"] == len(stored)
    assert found["parameters"] == sum(one.numel() for one in stored.values())
    assert found["bytes"] == 4 * found["parameters"]
    assert found["files"] == [
        {"file": WEIGHTS, "bytes": (here / "aligned" / WEIGHTS).stat().st_size, "tensors": len(stored)}
    ]
    assert {one["name"]: tuple(one["shape"]) for one in found["entries"]} == {
        name: tuple(one.shape) for name, one in stored.items()
    }
    text = keelwright("weights", "info", "aligned", cwd=here).stdout
    assert f"{found['parameters']:,} in {len(stored)} tensors" in text
    assert found["digest"] in text


def test_info_tells_two_models_apart_and_a_copy_not(keelwright_json: Command, here: Path) -> None:
    shutil.copytree(here / "aligned", here / "copy")
    digests = [keelwright_json("weights", "info", name, cwd=here)["digest"] for name in ("aligned", "copy", "tuned")]
    assert digests[0] == digests[1] != digests[2]


def test_diff_names_what_changed_and_by_how_much(keelwright: Command, keelwright_json: Command, here: Path) -> None:
    found = keelwright_json("weights", "diff", "aligned", "tuned", "--quiet", cwd=here)
    before, after = weights_of(here / "aligned"), weights_of(here / "tuned")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {one["name"] for one in found["tensors"]} == moved
    assert found["equal"] == len(before) - len(moved) > 0
    for one in found["tensors"]:
        change = (after[one["name"]] - before[one["name"]]).double()
        assert one["relative_norm"] == pytest.approx(float(change.norm() / before[one["name"]].double().norm()))
        assert one["largest"] == pytest.approx(float(change.abs().max()), rel=1e-5)
        assert one["changed"] == int((change != 0).sum())
    assert (
        f"{len(moved)} of {len(before)} tensors differ"
        in keelwright("weights", "diff", "aligned", "tuned", cwd=here).stdout
    )
    assert min(moved) in keelwright("weights", "diff", "aligned", "tuned", "--tensors", cwd=here).stdout


def test_diff_of_equal_models_and_of_models_of_other_sizes(
    keelwright: Command, keelwright_json: Command, here: Path
) -> None:
    same = keelwright_json("weights", "diff", "aligned", "aligned", cwd=here)
    assert (same["tensors"], same["changed_elements"]) == ([], 0)
    make(here / "small", 0, layers=1)
    other = keelwright_json("weights", "diff", "aligned", "small", cwd=here)
    assert other["only_first"] and all(".layers.1." in name for name in other["only_first"])
    assert "only in aligned: model.layers.1." in keelwright("weights", "diff", "aligned", "small", cwd=here).stdout


def test_a_difference_becomes_an_adapter_that_gives_the_tuned_model_back(
    keelwright: Command, keelwright_json: Command, here: Path
) -> None:
    line = ("weights", "extract-lora", "aligned", "tuned")
    found = keelwright_json(*line, "--out", "lora", "--rank", "2", cwd=here)
    assert found["totals"]["matrices"] == 14
    assert found["totals"]["largest_rank"] == 2
    assert found["totals"]["relative_error"] < 1e-5
    assert not found["not_represented"]
    back = keelwright_json("weights", "diff", "tuned", "aligned+lora", cwd=here)
    assert back["compared"] == len(weights_of(here / "tuned"))
    assert max(one["largest"] for one in back["tensors"]) < 1e-6
    text = keelwright(*line, "--out", "thin", "--rank", "1", cwd=here).stdout
    assert "rank up to 1" in text and "next: keelwright audit aligned+thin" in text
    kept = keelwright_json(*line, "--out", "most", "--energy", "0.5", cwd=here)["totals"]["energy"]
    assert 0.5 <= kept < 1


def test_extract_lora_refuses_models_of_other_sizes_and_a_taken_folder(keelwright: Command, here: Path) -> None:
    make(here / "small", 0, layers=1)
    done = keelwright("weights", "extract-lora", "aligned", "small", "--out", "lora", "--rank", "2", cwd=here, code=BAD)
    refusal(done, "ModelMismatchError")
    assert not (here / "lora").exists()
    done = keelwright(
        "weights", "extract-lora", "aligned", "tuned", "--out", "small", "--rank", "2", cwd=here, code=MACHINE
    )
    refusal(done, "StorageError", "is not empty")


def test_verify_finds_what_was_changed_afterwards(keelwright: Command, keelwright_json: Command, here: Path) -> None:
    keelwright("repair", "linear", *PAIR, "--out", "out", cwd=here)
    found = keelwright_json("weights", "verify", "out", cwd=here)
    assert found["files"] == len(list((here / "out").iterdir())) - 1
    assert "all as they were written" in keelwright("weights", "verify", "out", cwd=here).stdout
    path = here / "out" / WEIGHTS
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 8
    path.write_bytes(raw)
    refusal(keelwright("weights", "verify", "out", cwd=here, code=BAD), "DataError", f"out/{WEIGHTS}", "SHA-256")
    path.unlink()
    refusal(keelwright("weights", "verify", "out", cwd=here, code=MACHINE), "MissingError", f"lacks '{WEIGHTS}'")
    lock = here / "out" / "merge.lock.json"
    row = json.loads(lock.read_text())
    lock.write_text(json.dumps({**row, "files": {"../tuned/config.json": "0" * 64}}))
    refusal(keelwright("weights", "verify", "out", cwd=here, code=BAD), "UnsafeInputError")


@pytest.mark.parametrize(
    ("words", "code", "error"),
    [
        (("weights", "info", "nowhere/at/all"), MACHINE, "MissingError"),
        (("weights", "diff", "aligned", "nowhere/at/all"), MACHINE, "MissingError"),
        (("weights", "verify", "aligned"), MACHINE, "MissingError"),
        (("weights", "extract-lora", "aligned", "tuned", "--out", "o", "--energy", "2"), BAD, "ConfigError"),
        (("repair", "ties", *PAIR, "--set", "densty=0.5", "--out", "o"), BAD, "ConfigError"),
        (("repair", "ties", *PAIR, "--set", "density=much", "--out", "o"), BAD, "ConfigError"),
        (("repair", "ties", *PAIR, "--set", "density", "--out", "o"), BAD, "ConfigError"),
        (("repair", "linear", *PAIR, "--coefficient", "0.5,0.5", "--out", "o"), BAD, "ConfigError"),
        (("repair", "linear", *PAIR, "--out-dtype", "INT8", "--out", "o"), BAD, "ConfigError"),
        (("repair", "linear", *PAIR, "--executor", "threads", "--out", "o"), BAD, "ConfigError"),
        (("repair", "model_stock", *PAIR, "--out", "o"), BAD, "ConfigError"),
        (("repair", "linear", "--aligned", "aligned", "--tuned", "small", "--out", "o"), BAD, "ModelMismatchError"),
        (("repair", "recipe.yaml", "--tuned", "tuned", "--out", "o"), BAD, "ConfigError"),
    ],
)  # fmt: skip
def test_a_wrong_word_is_explained_as_text_and_as_json(
    words: tuple[str, ...], code: int, error: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(here)
    make(here / "small", 0, layers=1)
    (here / "recipe.yaml").write_text("merge_method: linear\n")
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == code, done.output
    refusal(done, error)
    document = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert document["error"]["type"] == error
    assert document["error"]["exit_code"] == code
    assert not list(here.glob("o*"))


def test_several_coefficients_make_the_outputs_of_single_runs(
    keelwright: Command, keelwright_json: Command, here: Path
) -> None:
    found = keelwright_json("repair", "slerp", *PAIR, "--coefficient", "0,0.25,1", "--out", "sweep", cwd=here)
    assert [Path(one["out"]).name for one in found["outputs"]] == [
        f"coefficient-{value}" for value in ("0", "0.25", "1")
    ]
    assert not list(here.glob("**/*.partial"))
    for value in ("0", "0.25", "1"):
        keelwright("repair", "slerp", *PAIR, "--coefficient", value, "--out", f"one-{value}", cwd=here)
        folder = here / "sweep" / f"coefficient-{value}"
        assert (folder / WEIGHTS).read_bytes() == (here / f"one-{value}" / WEIGHTS).read_bytes()
        keelwright("weights", "verify", folder, cwd=here)
    for value, name in (("0", "aligned"), ("1", "tuned")):
        made, wanted = weights_of(here / "sweep" / f"coefficient-{value}"), weights_of(here / name)
        assert all(made[key].numpy().tobytes() == wanted[key].numpy().tobytes() for key in wanted)


def test_settings_workers_and_shards_as_a_user_types_them(
    keelwright: Command, keelwright_json: Command, here: Path
) -> None:
    line = ("repair", "ties", *PAIR, "--tuned", "tuned_2", "--set", "density=0.4", "--set", "weight=[1, 0.5]")
    found = keelwright_json(*line, "--workers", "1", "--out", "one", cwd=here)
    assert found["method"] == "ties" and found["form"] == "full"
    lock = json.loads((here / "one" / "merge.lock.json").read_text())
    assert lock["settings"]["density"] == 0.4 and lock["settings"]["weight"] == [1, 0.5]
    keelwright(*line, "--workers", "2", "--out", "two", cwd=here)
    assert (here / "one" / WEIGHTS).read_bytes() == (here / "two" / WEIGHTS).read_bytes()
    keelwright(*line, "--max-shard-gb", "0.000008", "--out", "three", cwd=here)
    assert len(list((here / "three").glob("*.safetensors"))) > 1
    one, three = weights_of(here / "one"), weights_of(here / "three")
    assert one.keys() == three.keys() and all(torch.equal(one[name], three[name]) for name in one)
    assert AutoModelForCausalLM.from_pretrained(here / "three").dtype is torch.float32


@pytest.mark.parametrize(("spelt", "dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16), ("F64", torch.float64)])
def test_an_output_in_another_dtype_is_rounded_once_and_says_so(
    spelt: str, dtype: torch.dtype, keelwright: Command, here: Path
) -> None:
    keelwright("repair", "linear", *PAIR, "--coefficient", "0.3", "--out-dtype", spelt, "--out", "out", cwd=here)
    keelwright("repair", "linear", *PAIR, "--coefficient", "0.3", "--out", "plain", cwd=here)
    found, plain = weights_of(here / "out"), weights_of(here / "plain")
    assert {one.dtype for one in found.values()} == {dtype}
    if spelt != "F64":
        assert all(torch.equal(found[name], plain[name].to(dtype)) for name in plain)
    else:
        assert all(torch.allclose(found[name], plain[name].double(), atol=1e-7) for name in plain)
    config = json.loads((here / "out" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == str(dtype).removeprefix("torch.")


def test_no_weight_that_overflows_the_output_is_written(keelwright: Command, here: Path) -> None:
    for name in ("aligned", "tuned"):
        tensors = weights_of(here / name)
        tensors["model.norm.weight"][3] = 70000.0
        shutil.copytree(here / name, here / f"large-{name}")
        save_file(tensors, here / f"large-{name}" / WEIGHTS, metadata={"format": "pt"})
    line = ("repair", "linear", "--aligned", "large-aligned", "--tuned", "large-tuned", "--out-dtype", "F16")
    done = keelwright(*line, "--out", "out", cwd=here, code=BAD)
    refusal(done, "NumericalError", "model.norm.weight", "element 3")
    assert not list(here.glob("out*"))


def test_explain_prints_the_plan_and_writes_nothing(keelwright: Command, keelwright_json: Command, here: Path) -> None:
    (here / "recipe.yaml").write_text(
        "merge_method: ties\nbase_model: aligned\ndtype: float32\nmodels:\n"
        "  - model: tuned\n    parameters: {weight: 1, density: 0.5}\n"
        "  - model: tuned_2\n    parameters: {weight: 1, density: 0.5}\n"
    )
    text = keelwright("repair", "recipe.yaml", "--explain", cwd=here).stdout
    assert "model.layers.{0-1}.*" in text and "density 0.5, 0.5" in text
    found = keelwright_json("repair", "recipe.yaml", "--out", "out", cwd=here)
    keelwright(
        "repair", "ties", *PAIR, "--tuned", "tuned_2", "--set", "density=0.5", "--set", "weight=1", "--out", "method",
        cwd=here,
    )  # fmt: skip
    assert found["method"] == "ties"
    made, wanted = weights_of(here / "out"), weights_of(here / "method")
    assert all(torch.equal(made[name], wanted[name]) for name in wanted)
