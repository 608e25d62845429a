# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from keelwright.core.catalogue import find_method
from keelwright.core.errors import (
    ConfigError,
    DataError,
    MissingError,
    ModelMismatchError,
    NumericalError,
    StorageError,
)
from keelwright.core.protocols import Silent
from keelwright.models.refs import LocalModel, parse_ref, resolve
from keelwright.models.sources import open_source
from keelwright.repair.linear import Linear, LinearConfig
from keelwright.repair.materialise import Output, materialise_edit, repair
from keelwright.weights.lock import verify

MakeFolder = Callable[..., Path]


@pytest.fixture
def pair(make_folder: MakeFolder) -> tuple[Path, Path]:
    return make_folder("aligned", 1), make_folder("tuned", 2, near=1)


def logits(folder: Path | str) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(torch.arange(1, 9)[None]).logits


def test_linear_writes_a_folder_that_transformers_opens(pair: tuple[Path, Path], tmp_path: Path) -> None:
    aligned, tuned = pair
    summary = repair("linear", aligned=aligned, tuned=tuned, coefficient=0.25, out=tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    before, after = load_file(aligned / "model.safetensors"), load_file(tuned / "model.safetensors")
    for name, tensor in merged.items():
        assert torch.allclose(tensor, 0.75 * before[name] + 0.25 * after[name], atol=1e-6)
    assert logits(tmp_path / "out").isfinite().all()
    template = AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert template == AutoTokenizer.from_pretrained(tuned).chat_template
    assert template is not None
    assert summary["schema"] == 1
    assert summary["command"] == "repair"
    assert (summary["method"], summary["coefficients"]) == ("linear", {"coefficient": 0.25})
    assert (summary["out"], summary["form"]) == (str(tmp_path / "out"), "full")
    assert summary["tensors"] == len(merged)
    assert verify(tmp_path / "out")["files"] == len(summary["files"])
    json.dumps(summary)


def test_without_a_coefficient_the_method_s_default_is_used(pair: tuple[Path, Path], tmp_path: Path) -> None:
    summary = repair("linear", aligned=pair[0], tuned=pair[1], out=tmp_path / "out")
    assert summary["coefficients"] == {"coefficient": 0.6}


def test_resta_reads_three_models(pair: tuple[Path, Path], make_folder: MakeFolder, tmp_path: Path) -> None:
    unaligned = make_folder("unaligned", 3, near=1)
    repair("resta", aligned=pair[0], unaligned=unaligned, tuned=pair[1], coefficient=0.5, out=tmp_path / "out")
    a, u, t = (load_file(one / "model.safetensors") for one in (pair[0], unaligned, pair[1]))
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.allclose(tensor, t[name] + 0.5 * (a[name] - u[name]), atol=1e-6)


def test_a_limit_on_files_is_honoured(pair: tuple[Path, Path], tmp_path: Path) -> None:
    repair("linear", aligned=pair[0], tuned=pair[1], out=tmp_path / "whole", coefficient=0.5)
    repair("linear", aligned=pair[0], tuned=pair[1], out=tmp_path / "cut", coefficient=0.5, max_shard_bytes=4000)
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 1
    assert torch.equal(logits(tmp_path / "whole"), logits(tmp_path / "cut"))


def test_live_models_are_sources_too(make_live: Callable[..., Any], pair: tuple[Path, Path], tmp_path: Path) -> None:
    live = repair("linear", aligned=make_live(1), tuned=make_live(2, near=1), coefficient=0.5, out=tmp_path / "live")
    repair("linear", aligned=pair[0], tuned=pair[1], coefficient=0.5, out=tmp_path / "disk")
    assert torch.equal(logits(tmp_path / "live"), logits(tmp_path / "disk"))
    assert AutoTokenizer.from_pretrained(tmp_path / "live").eos_token == "<end>"
    assert live["form"] == "full"


def test_a_tuned_adapter_comes_out_as_an_adapter_and_on_request_in_full(
    pair: tuple[Path, Path], make_adapter: MakeFolder, tmp_path: Path
) -> None:
    adapter = make_adapter("adapter", pair[0])
    tuned = f"{pair[0]}+{adapter}"
    small = repair("linear", aligned=pair[0], tuned=tuned, coefficient=0.5, out=tmp_path / "small")
    full = repair("linear", aligned=pair[0], tuned=tuned, coefficient=0.5, out=tmp_path / "full", output_form="full")
    assert (small["form"], full["form"]) == ("adapter", "full")
    assert (tmp_path / "small" / "adapter_config.json").is_file()
    assert not (tmp_path / "small" / "model.safetensors").exists()
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(pair[0])
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(base, str(tmp_path / "small")).eval()(torch.arange(1, 9)[None]).logits
    # PEFT adds the delta to the activations, the full output to the weights.
    assert torch.allclose(adapted, logits(tmp_path / "full"), atol=1e-5)


def test_an_adapter_is_refused_where_the_edit_is_none(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        repair("linear", aligned=pair[0], tuned=pair[1], out=tmp_path / "out", output_form="adapter")
    assert caught.value.problem == "'linear' on these models is no adapter."
    assert not (tmp_path / "out").exists()


def test_two_models_without_a_common_parent_are_refused_unless_forced(make_folder: MakeFolder, tmp_path: Path) -> None:
    aligned, stranger = make_folder("aligned", 1), make_folder("stranger", 9)
    with pytest.raises(ModelMismatchError) as caught:
        repair("linear", aligned=aligned, tuned=stranger, out=tmp_path / "out")
    assert caught.value.exit_code == 2
    assert caught.value.problem == "'aligned' and 'tuned' do not look like parent and child."
    assert caught.value.expected == "weights within 0.5 of each other, relative to their size"
    assert "--force" in str(caught.value.fix)
    assert not (tmp_path / "out").exists()
    repair("linear", aligned=aligned, tuned=stranger, out=tmp_path / "out", force=True)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_missing_role_names_its_flag(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        repair("resta", aligned=pair[0], tuned=pair[1], out=tmp_path / "out")
    assert caught.value.fix == "pass --unaligned"


def test_a_role_that_the_method_does_not_read_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not read a model for 'unaligned'"):
        repair("linear", aligned=pair[0], tuned=pair[1], unaligned=pair[0], out=tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"method": "liner"}, ConfigError, "There is no repair method 'liner'"),
        ({"coefficient": 1.5}, ConfigError, "'coefficient' is out of range"),
        ({"output_form": "zip"}, ConfigError, "'output_form' is not a known choice"),
        ({"tuned": "no/such/folder/here"}, MissingError, "no such folder"),
    ],
)
def test_bad_settings_fail_before_anything_is_written(
    pair: tuple[Path, Path], tmp_path: Path, change: dict[str, Any], kind: type[Exception], text: str
) -> None:
    settings: dict[str, Any] = {"method": "linear", "aligned": pair[0], "tuned": pair[1], "out": tmp_path / "out"}
    with pytest.raises(kind, match=text):
        repair(**{**settings, **change})
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_refused_before_the_models_are_opened(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught:
        repair("linear", aligned="no/such/folder/here", tuned=pair[1], out=pair[0])
    assert caught.value.fix == "give --out another path, or empty the folder"


def test_another_chat_template_is_refused_unless_allowed(make_folder: MakeFolder, tmp_path: Path) -> None:
    aligned = make_folder("aligned", 1)
    tuned = make_folder("tuned", 2, near=1, template="{{ messages[0]['content'] }}")
    with pytest.raises(ModelMismatchError, match="different chat templates"):
        repair("linear", aligned=aligned, tuned=tuned, out=tmp_path / "out")
    repair("linear", aligned=aligned, tuned=tuned, out=tmp_path / "out", allow_template_change=True)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ messages[0]['content'] }}"


def test_a_weight_that_is_no_number_names_the_tensor(pair: tuple[Path, Path], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    file = pair[1] / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(NumericalError, match=r"tensor 'model\.norm\.weight', element 3"):
        repair("linear", aligned=pair[0], tuned=pair[1], out=tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_measured_figures_reach_the_card(pair: tuple[Path, Path], tmp_path: Path) -> None:
    locals_: dict[str, LocalModel] = {
        role: resolve(parse_ref(folder), offline=True) for role, folder in zip(("aligned", "tuned"), pair, strict=True)
    }
    rate = {"value": 0.25, "low": 0.1, "high": 0.4, "n": 40}
    materialise_edit(
        find_method("linear"),
        Linear(LinearConfig(0.5)),
        {role: open_source(local) for role, local in locals_.items()},
        locals_["tuned"],
        Output(tmp_path / "out"),
        results={"tuned": {"harm_rate": rate}, "repaired": {"harm_rate": rate}},
        progress=Silent(),
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| harm_rate | 0.25 [0.1, 0.4], n=40 |" in card
    assert "safety not evaluated" not in card


def test_without_figures_the_card_says_that_safety_was_not_evaluated(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (pair[0] / "README.md").write_text("---\nlicense: mit\n---\n")
    repair("linear", aligned=pair[0], tuned=pair[1], out=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "safety not evaluated" in card
    assert "arXiv 2412.19512" in card
    assert "| mit |" in card


def test_the_plan_is_shown_before_anything_is_written(pair: tuple[Path, Path], tmp_path: Path) -> None:
    class Watching(Silent):
        rows: dict[str, str] = {}  # noqa: RUF012
        existed = True

        def plan(self, title: str, rows: Any) -> None:
            self.rows, self.existed = dict(rows), bool(list(tmp_path.glob("out*")))

    watching = Watching()
    repair("linear", aligned=pair[0], tuned=pair[1], out=tmp_path / "out", progress=watching)
    assert watching.rows["aligned"] == str(pair[0])
    assert "output" in watching.rows
    assert not watching.existed


def test_a_truncated_file_is_refused_before_anything_is_written(pair: tuple[Path, Path], tmp_path: Path) -> None:
    aligned, tuned = pair
    weights = tuned / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(DataError, match="is cut short"):
        repair("linear", aligned=aligned, tuned=tuned, out=tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
