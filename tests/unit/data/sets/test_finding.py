# SPDX-License-Identifier: Apache-2.0
"""Where the files of a set are looked for, in which order, and what is said when they are nowhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from keelwright.core.errors import DataError, MissingError
from keelwright.data.sets.catalogue import find_set
from keelwright.data.sets.finding import find_files

XSTEST, SAFEBENCH, HARMBENCH = find_set("xstest"), find_set("u-safebench"), find_set("harmbench")
PARTS = ("safety_eval_collection_v1.1.json", "helpfulness_eval_collection_v1.1.json")


@pytest.fixture(autouse=True)
def _no_shared_folder_and_an_empty_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("KEELWRIGHT_DATA", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[]", encoding="utf-8")
    return path


def test_a_folder_that_holds_the_files(tmp_path: Path) -> None:
    path = touch(tmp_path / "xstest_prompts.csv")
    assert find_files(XSTEST, data=tmp_path, offline=True) == {"prompts": (path,)}


def test_a_folder_with_one_folder_per_set_comes_before_files_beside_them(tmp_path: Path) -> None:
    touch(tmp_path / "xstest_prompts.csv")
    path = touch(tmp_path / "xstest" / "xstest_prompts.csv")
    assert find_files(XSTEST, data=tmp_path, offline=True) == {"prompts": (path,)}


def test_a_folder_as_the_hub_lays_it_out(tmp_path: Path) -> None:
    mbpp = find_set("mbpp")
    paths = [touch(tmp_path / name) for name in mbpp.files[0].hub]
    assert find_files(mbpp, data=tmp_path, offline=True) == {"problems": tuple(paths)}
    paths[1].unlink()
    with pytest.raises(MissingError):
        find_files(mbpp, data=tmp_path, offline=True)


def test_upstreams_name_of_a_file_is_known_too(tmp_path: Path) -> None:
    path = touch(tmp_path / "xstest_v2_prompts.csv")
    assert find_files(XSTEST, data=tmp_path, offline=True) == {"prompts": (path,)}


def test_one_file_is_enough_where_the_set_needs_one_whatever_its_name(tmp_path: Path) -> None:
    path = touch(tmp_path / "my copy.csv")
    assert find_files(XSTEST, data=path, offline=True) == {"prompts": (path,)}
    assert find_files(HARMBENCH, data=path, offline=True) == {"behaviours": (path,)}


def test_one_file_of_several_stands_for_its_folder(tmp_path: Path) -> None:
    safety, helpfulness = (touch(tmp_path / name) for name in PARTS)
    assert find_files(SAFEBENCH, data=safety, offline=True) == {"safety": (safety,), "helpfulness": (helpfulness,)}
    with pytest.raises(DataError) as caught:
        find_files(SAFEBENCH, data=touch(tmp_path / "other.json"), offline=True)
    assert caught.value.problem == f"'{tmp_path / 'other.json'}' alone is not the data set 'u-safebench'."


def test_an_optional_file_may_be_absent(tmp_path: Path) -> None:
    touch(tmp_path / "harmbench_behaviors_text_all.csv")
    assert list(find_files(HARMBENCH, data=tmp_path, offline=True)) == ["behaviours"]
    touch(tmp_path / "harmbench_behaviors_text_val.csv")
    assert list(find_files(HARMBENCH, data=tmp_path, offline=True)) == ["behaviours", "validation"]


def test_a_set_of_optional_files_needs_one_of_them(tmp_path: Path) -> None:
    answers = find_set("xstest-answers")
    with pytest.raises(MissingError) as caught:
        find_files(answers, data=tmp_path, offline=True)
    assert ", completions_mistralguard_labelled.csv or " in str(caught.value.expected)
    path = touch(tmp_path / "completions_mistralguard_labelled.csv")
    assert find_files(answers, data=tmp_path, offline=True) == {"mistralguard": (path,)}


def test_the_environment_names_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = touch(tmp_path / "xstest" / "xstest_prompts.csv")
    monkeypatch.setenv("KEELWRIGHT_DATA", str(tmp_path))
    assert find_files(XSTEST, data=None, offline=True) == {"prompts": (path,)}


def test_a_named_folder_is_the_only_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "shared" / "xstest" / "xstest_prompts.csv")
    monkeypatch.setenv("KEELWRIGHT_DATA", str(tmp_path / "shared"))
    with pytest.raises(MissingError) as caught:
        find_files(XSTEST, data=tmp_path / "mine", offline=True)
    assert caught.value.found == f"none of them; looked in: '{tmp_path / 'mine'}' (there is no such folder)"


def test_nowhere_is_an_error_with_names_places_and_the_way_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEELWRIGHT_DATA", str(tmp_path))
    with pytest.raises(MissingError) as caught:
        find_files(SAFEBENCH, data=None, offline=True)
    error = caught.value
    assert error.problem == "The data set 'u-safebench' (U-SafeBench) was not found."
    assert error.expected == (
        "safety_eval_collection_v1.1.json or safety_eval_collection.json and "
        "helpfulness_eval_collection_v1.1.json or helpfulness_eval_collection.json"
    )
    assert error.found == (
        f"none of them; looked in: '{tmp_path}' (KEELWRIGHT_DATA); "
        "hub data set Yeonjun/U-SafeBench: not in the cache of earlier downloads, and no download was asked for"
    )
    assert error.fix == (
        "fetch it with --data hub or `hf download Yeonjun/U-SafeBench --repo-type dataset`, or get the files from "
        "github.com/yeonjun-in/U-SafeBench, data, and name their folder (or set KEELWRIGHT_DATA)"
    )


def test_a_set_that_the_hub_does_not_have_is_not_looked_for_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keelwright.data.sets.hub.fetch", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(MissingError) as caught:
        find_files(find_set("advbench"), data=None, offline=False)
    assert caught.value.found == "none of them; looked in: KEELWRIGHT_DATA is not set"
    assert str(caught.value.fix).startswith("get the files from github.com/llm-attacks")
