# SPDX-License-Identifier: Apache-2.0
"""The race on the live organism: what fails is out, the others go on, and the model comes back bit for bit."""

from dataclasses import dataclass, replace

import pytest
import torch

from keelwright.core import catalogue as lines
from keelwright.core.catalogue import MethodLine
from keelwright.core.errors import ConfigError, NumericalError, StorageError
from keelwright.core.protocols import SearchSpace
from keelwright.heal.loop import heal
from keelwright.models.loading import load
from keelwright.repair.linear import Linear

ALIGNED, BASE = "lab:workshop/aligned", "lab:workshop/base"
SETTINGS = {"no_utility": True, "suite": "workshop", "limit": 16, "refinements": 1, "batch_size": 256}
ERROR = {"expected": "e", "found": "f", "fix": "x"}


@dataclass(frozen=True, slots=True)
class Overflowing(Linear):
    """Fails at strong settings only."""

    search_space = SearchSpace(neutral=1.0, grid=(0.1, 0.5))

    def edit(self, name, chunk, found):
        if self.config.coefficient < 0.3:
            raise NumericalError("The tensor does not fit its dtype.", **ERROR)
        return Linear(self.config).edit(name, chunk, found)


@dataclass(frozen=True, slots=True)
class Unsuitable(Linear):
    """Fails at every setting."""

    def edit(self, name, chunk, found):
        raise torch.linalg.LinAlgError("no convergence")


@dataclass(frozen=True, slots=True)
class Unprepared(Linear):
    """Cannot be prepared for these models."""

    def prepare(self, ingredients):
        raise ConfigError("There are no adapters.", **ERROR)


@dataclass(frozen=True, slots=True)
class Breaking(Linear):
    """Meets a full disk."""

    def edit(self, name, chunk, found):
        raise StorageError("The disk is full.", **ERROR)


@dataclass(frozen=True, slots=True)
class Learned(Linear):
    """Works only when it was prepared."""

    secret: str = ""

    def prepare(self, ingredients):
        PREPARED.append(ingredients)
        return replace(self, secret="known")

    def edit(self, name, chunk, found):
        assert self.secret == "known"
        return Linear(self.config).edit(name, chunk, found)


PREPARED = []


@pytest.fixture(autouse=True)
def with_fakes(monkeypatch):
    own = [line for line in lines._OWN if line.name in ("linear", "slerp", "nearswap", "ties")]
    for kind in (Overflowing, Unsuitable, Unprepared, Breaking, Learned):
        name = kind.__name__.lower()
        own.append(MethodLine(name, "repair", name, "s", "faithful", (), 0, f"{__name__}:{kind.__name__}"))
    monkeypatch.setattr(lines, "_OWN", tuple(own))
    lines.catalogue.cache_clear()
    PREPARED.clear()
    yield
    lines.catalogue.cache_clear()


def run(tmp_path, *methods, tuned=BASE, **settings):
    places = {"out": tmp_path / "fixed", "run": tmp_path / "run"}
    return heal(ALIGNED, tuned, **places, **{**SETTINGS, **settings}, methods=methods)


def test_a_method_that_fails_is_reported_and_the_others_go_on(tmp_path):
    summary = run(tmp_path, "unsuitable", "unprepared", "overflowing", "linear")
    race = {row["method"]: row for row in summary["race"]}
    assert race["unsuitable"]["ended"] == race["unprepared"]["ended"] == "failed"
    assert "did not converge" in race["unsuitable"]["text"]
    assert race["unprepared"]["text"] == "There are no adapters. Found f."
    assert "The tensor does not fit its dtype." in race["overflowing"]["text"]
    assert race["overflowing"]["text"].startswith("at 0.1: ")
    assert {trial["method"] for trial in summary["trials"]} == {"overflowing", "linear"}


def test_where_nothing_can_be_tried_the_first_error_is_raised(tmp_path):
    with pytest.raises(NumericalError, match="did not converge"):
        run(tmp_path, "unsuitable")


def test_what_the_machine_lacks_stops_the_run(tmp_path):
    with pytest.raises(StorageError, match="The disk is full"):
        run(tmp_path, "linear", "breaking")


def test_a_method_is_prepared_once_and_tried_at_every_setting(tmp_path):
    summary = run(tmp_path, "learned")
    assert len(PREPARED) == 1
    assert set(PREPARED[0].sources) == {"aligned", "tuned"}
    assert len(summary["trials"]) >= 4


def test_a_race_of_many_methods_says_on_how_many_items_each_trial_rests(tmp_path):
    live = load(BASE)
    before = {name: value.clone() for name, value in live.module.state_dict().items()}
    summary = run(tmp_path, "linear", "slerp", "nearswap", "ties", "learned", tuned=live)
    assert all(torch.equal(value, before[name]) for name, value in live.module.state_dict().items())
    race = {row["method"]: row for row in summary["race"]}
    behind = [name for name, row in race.items() if row["ended"] == "left_behind"]
    assert len(behind) == 2
    assert {row["round"] for row in race.values() if row["ended"] == "left_behind"} == {"quarter"}
    for trial in summary["trials"]:
        is_behind = trial["method"] in behind
        assert trial["part"] == ("quarter" if is_behind else "selection")
        assert trial["items"] == race[trial["method"]]["items"] > 0
    sizes = sorted({trial["items"] for trial in summary["trials"]})
    assert sizes[0] < sizes[1]
    assert all(summary["trials"][index]["part"] == "selection" for index in summary["pareto"])
    assert summary["chosen"] is None or summary["trials"][summary["chosen"]]["part"] == "selection"


def test_three_methods_are_all_tried_on_the_whole_selection_half(tmp_path):
    summary = run(tmp_path, "linear", "slerp", "ties")
    assert {trial["part"] for trial in summary["trials"]} == {"selection"}
    assert {row["ended"] for row in summary["race"]} <= {"chosen", "finalist"}
