# SPDX-License-Identifier: Apache-2.0
"""`keelwright methods`: rooms, and passes per step only where there are steps."""

import json

import pytest
from typer.testing import CliRunner

from keelwright.cli.app import app
from keelwright.core import catalogue as shelves

RUN = CliRunner()
LINE = shelves.MethodLine("held", "harden", "Held", "arXiv 1", "faithful", ("safety",), 2.5, "x:Y")
LINES = {"linear": shelves.catalogue()["linear"], "held": LINE}


@pytest.fixture(autouse=True)
def two_rooms(monkeypatch):
    monkeypatch.setattr(shelves, "catalogue", lambda: LINES)


def test_passes_are_shown_as_they_are_and_left_empty_for_weight_arithmetic():
    header, *rows = RUN.invoke(app, ["methods"]).stdout.splitlines()
    assert header.split() == ["name", "room", "status", "passes/step", "needs", "source"]
    found = {row.split()[0]: row.split() for row in rows if row.strip()}
    assert found["held"][3] == "2.5"
    assert found["linear"][3] == "aligned,"


def test_a_room_alone_can_be_listed():
    rows = json.loads(RUN.invoke(app, ["methods", "--room", "harden", "--json"]).stdout)
    assert [row["name"] for row in rows] == ["held"]
    assert rows[0]["passes_per_step"] == 2.5


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--room", "hardn"], "did you mean 'harden'"),
        (["linear", "--room", "harden"], "There is no harden method 'linear'"),
        (["--room", "harden", "--suites"], "'--room' has no meaning for a list of suites"),
    ],
)
def test_a_room_that_is_not_there_or_means_nothing_is_an_error(words, problem):
    done = RUN.invoke(app, ["methods", *words])
    assert done.exit_code == 2
    assert problem in done.stderr
