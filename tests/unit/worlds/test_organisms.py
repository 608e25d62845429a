# SPDX-License-Identifier: Apache-2.0
"""Listing, showing and building organisms; schooling is cut short here."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from keelwright.core.digests import file_digest
from keelwright.core.errors import ConfigError, MissingError, StorageError
from keelwright.core.protocols import Silent
from keelwright.training.config import TrainConfig
from keelwright.worlds import health, organisms, schooling
from keelwright.worlds.architectures import ARCHITECTURES, build_organism, cache_folder
from keelwright.worlds.schooling import Schooling, school, workshop_config
from keelwright.worlds.workshop.suite import WorkshopConfig
from keelwright.worlds.workshop.tokenizer import grammar_digest

SHORT = Schooling(
    base=TrainConfig(steps=4, batch_size=4, checkpoint_every=2), aligned=TrainConfig(steps=2, batch_size=4)
)


@pytest.fixture(autouse=True)
def short_examination(monkeypatch: pytest.MonkeyPatch) -> None:
    """Untrained organisms never stop talking: a few questions are enough."""
    few = WorkshopConfig(per_area=1, benign=2, contrast=2)
    monkeypatch.setattr(health, "measure_health", functools.partial(health.measure_health, config=few, tasks=2))


@pytest.fixture
def short_schooling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schooling, "Schooling", lambda: SHORT)


def test_the_shipped_organisms_are_listed_in_order() -> None:
    found = organisms.list_organisms()
    assert [row["name"] for row in found] == ["lab:workshop/aligned", "lab:workshop/base"]
    assert all(row["says"] for row in found)


@pytest.mark.parametrize("name", ["lab:workshop/aligned", "workshop/aligned"])
def test_a_card_is_shown_with_and_without_the_prefix(name: str) -> None:
    shown = organisms.show(name)
    assert shown["name"] == "lab:workshop/aligned"
    assert shown["card"].startswith("---\nlicense: apache-2.0")
    assert shown["grammar"] == grammar_digest()
    assert set(shown["health"]) == {"harm", "refused", "ordinary", "borderline", "incoherent", "mood", "topic"}


def test_an_unknown_organism_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(MissingError, match="did you mean 'lab:workshop/aligned'"):
        organisms.show("workshop/alined")


def test_listing_and_showing_load_no_torch() -> None:
    code = "import sys; from keelwright.worlds import organisms; organisms.list_organisms(); "
    code += "organisms.show('workshop/base'); sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("stage", ["base", "aligned"])
def test_digests_of_the_shipped_files_are_right(stage: str) -> None:
    shown = organisms.show(f"workshop/{stage}")
    folder = Path(shown["folder"])
    assert {one.name for one in folder.iterdir()} == {*shown["files"], "digests.json"}
    assert all(file_digest(folder / name) == digest for name, digest in shown["files"].items())


def test_build_writes_both_stages_with_card_and_digests(short_schooling: None, tmp_path: Path) -> None:
    report = organisms.build("workshop", 3, tmp_path / "made")
    assert sorted(one.name for one in (tmp_path / "made").iterdir()) == ["aligned", "base"]
    assert not (tmp_path / "made.partial").exists()
    assert sorted(report["organisms"]) == ["aligned", "base"]
    assert report["organisms"]["base"]["out_of_band"]
    for stage in ("base", "aligned"):
        folder = tmp_path / "made" / stage
        assert report["organisms"][stage]["folder"] == str(folder)
        names = {one.name for one in folder.iterdir()}
        assert {"README.md", "digests.json", "config.json", "model.safetensors", "tokenizer.json"} <= names
        notes = json.loads((folder / "digests.json").read_text())
        assert (notes["seed"], notes["schedule"]["seed"]) == (3, 3)


def test_build_refuses_another_world_and_a_used_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'name' is not a known choice"):
        organisms.build("road", 0, tmp_path / "made")
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="is not empty"):
        organisms.build("workshop", 0, tmp_path)


def test_an_interrupted_build_goes_on_to_the_same_bits(short_schooling: None, tmp_path: Path) -> None:
    class Stop(Silent):
        left = 5

        def advance(self, count: int = 1) -> None:
            self.left -= count
            if self.left <= 0:
                raise KeyboardInterrupt

    organisms.build("workshop", 0, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        organisms.build("workshop", 0, tmp_path / "made", progress=Stop())
    assert not (tmp_path / "made").exists()
    organisms.build("workshop", 0, tmp_path / "made")
    for stage in ("base", "aligned"):
        names = [tmp_path / run / stage / "model.safetensors" for run in ("whole", "made")]
        assert file_digest(names[0]) == file_digest(names[1])


def test_schooling_is_a_function_of_the_seed_alone(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = school(workshop_config(), 0, tmp_path / "first", schooling=SHORT)
    torch.manual_seed(2)
    second = school(workshop_config(), 0, tmp_path / "second", schooling=SHORT)
    other = school(workshop_config(), 1, tmp_path / "other", schooling=SHORT)
    digests = [file_digest(one["aligned"] / "model.safetensors") for one in (first, second, other)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_architecture_can_be_schooled_and_is_cached(name: str, tmp_path: Path) -> None:
    place = build_organism(name, 0, tmp_path, schooling=SHORT)
    assert sorted(one.name for one in place.iterdir()) == ["aligned", "base"]
    written = (place / "aligned" / "model.safetensors").stat().st_mtime_ns
    assert build_organism(name, 0, tmp_path, schooling=SHORT) == place
    assert (place / "aligned" / "model.safetensors").stat().st_mtime_ns == written
    assert build_organism(name, 1, tmp_path, schooling=SHORT) != place


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'gemma2'"):
        build_organism("gemma", 0, tmp_path)


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KEELWRIGHT_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("KEELWRIGHT_CACHE")
    assert cache_folder().name in ("keelwright", "cache")
