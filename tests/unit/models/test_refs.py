# SPDX-License-Identifier: Apache-2.0
"""References: every form of a model's name leads to the right place, or to an error that says what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from keelwright.core.errors import ConfigError, MissingError
from keelwright.models import hub
from keelwright.models.loading import LoadedModel
from keelwright.models.refs import LocalModel, ModelRef, parse_ref, resolve


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "adapter", "org/name", "a+b", "with@sign"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "kind", "place", "revision", "adapters"),
    [
        ("base", "folder", "base", None, ()),
        ("./base", "folder", "./base", None, ()),
        ("base+adapter", "folder", "base", None, ("adapter",)),
        ("base+adapter+some/hub-adapter", "folder", "base", None, ("adapter", "some/hub-adapter")),
        ("org/name", "folder", "org/name", None, ()),
        ("other/name", "hub", "other/name", None, ()),
        ("other/name@v1.0", "hub", "other/name", "v1.0", ()),
        ("other/name@refs/pr/3", "hub", "other/name", "refs/pr/3", ()),
        ("gpt2", "hub", "gpt2", None, ()),
        ("other/name@main+adapter", "hub", "other/name", "main", ("adapter",)),
        ("a+b", "folder", "a+b", None, ()),
        ("a+b+adapter", "folder", "a+b", None, ("adapter",)),
        ("base+a+b", "folder", "base", None, ("a+b",)),
        ("with@sign", "folder", "with@sign", None, ()),
        ("lab:workshop/aligned", "lab", "workshop/aligned", None, ()),
        ("lab:workshop/aligned+adapter", "lab", "workshop/aligned", None, ("adapter",)),
    ],
)
def test_every_form_is_understood(
    here: Path, text: str, kind: str, place: str, revision: str | None, adapters: tuple[str, ...]
) -> None:
    ref = parse_ref(text)
    assert (ref.kind, ref.place, ref.revision, ref.adapters) == (kind, place, revision, adapters)
    assert ref.text == text
    assert parse_ref(ref) is ref


@pytest.mark.parametrize(
    "text", ["/no/such/folder", "./none", "a/b/c", "no such", "name@", "-x", "a--b/c", "~/none-of-this", "base+./none"]
)
def test_what_is_neither_folder_nor_hub_id_is_missing(here: Path, text: str) -> None:
    with pytest.raises(MissingError) as caught:
        parse_ref(text)
    assert caught.value.problem == f"There is no such folder: '{text.rpartition('+')[2]}'."
    assert "hub id such as org/name" in str(caught.value.expected)
    assert caught.value.fix == "check the spelling of the path"


@pytest.mark.parametrize("text", ["", "  ", "+adapter", "base+"])
def test_an_empty_name_is_refused(here: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="A model's name is empty"):
        parse_ref(text)


def test_a_path_is_a_folder_whatever_its_name(tmp_path: Path) -> None:
    assert parse_ref(tmp_path / "a+b@c").kind == "folder"
    with pytest.raises(MissingError, match="There is no such folder"):
        resolve(parse_ref(tmp_path / "a+b@c"), offline=True)


def test_a_file_is_told_from_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    with pytest.raises(MissingError, match="is a file, not a model folder") as caught:
        resolve(parse_ref(str(path)), offline=True)
    assert str(tmp_path) in str(caught.value.fix)


def test_folders_resolve_to_themselves(here: Path) -> None:
    local = resolve(parse_ref("base+adapter"), offline=True)
    assert (local.folder, local.adapter_folders) == (Path("base"), (Path("adapter"),))


def test_hub_ids_are_downloaded_with_their_revision(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None, bool]] = []

    def fake(repo: str, revision: str | None, *, offline: bool) -> Path:
        asked.append((repo, revision, offline))
        return here / repo.replace("/", "--")

    monkeypatch.setattr(hub, "download", fake)
    local = resolve(parse_ref("far/model@v2+far/adapter@v3"), offline=False)
    assert asked == [("far/model", "v2", False), ("far/adapter", "v3", False)]
    assert local.adapter_folders == (here / "far--adapter",)


def test_an_unknown_organism_is_missing_with_the_known_ones_named() -> None:
    with pytest.raises(MissingError) as caught:
        resolve(parse_ref("lab:workshop/alinged"), offline=True)
    assert caught.value.problem == "There is no shipped organism 'lab:workshop/alinged'."
    assert caught.value.fix


@pytest.mark.parametrize("name", ["../..", "workshop", "", "workshop/../workshop/aligned"])
def test_a_lab_name_cannot_leave_the_package(name: str) -> None:
    with pytest.raises(MissingError, match="no shipped organism"):
        resolve(parse_ref(f"lab:{name}"), offline=True)


def test_a_model_in_memory_is_live_and_has_no_files(
    make_model: Callable[..., PreTrainedModel], make_tokenizer: Callable[..., PreTrainedTokenizerFast]
) -> None:
    loaded = LoadedModel(make_model(), make_tokenizer(), "mine", "r1")
    ref = parse_ref(loaded)
    assert (ref.kind, ref.text, ref.revision) == ("live", "mine", "r1")
    assert ref.live is loaded
    with pytest.raises(ConfigError, match="'mine' is a model in memory; this needs files") as caught:
        resolve(ref, offline=True)
    assert "save_pretrained" in str(caught.value.fix)


def test_a_bare_module_takes_the_tokenizer_of_its_folder(
    make_folder: Callable[..., Path], make_model: Callable[..., PreTrainedModel]
) -> None:
    module = make_model()
    with pytest.raises(ConfigError, match="A module alone has no tokenizer"):
        parse_ref(module)
    module.config.name_or_path = module.name_or_path = str(make_folder())
    ref = parse_ref(module)
    assert ref.live is not None
    assert ref.live.module is module
    assert ref.live.tokenizer.eos_token == "<end>"


def test_the_tokenizer_comes_from_the_last_adapter_that_has_one(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("base", "one", "two", "three")]
    for folder in folders:
        folder.mkdir()
    ref = ModelRef("x", "folder", "x")
    assert LocalModel(ref, folders[0], tuple(folders[1:])).tokenizer_folder == folders[0]
    (folders[2] / "tokenizer.json").write_text("{}")
    assert LocalModel(ref, folders[0], tuple(folders[1:])).tokenizer_folder == folders[2]
