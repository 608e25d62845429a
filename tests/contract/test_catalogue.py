# SPDX-License-Identifier: Apache-2.0
"""The catalogue and the folders agree, and listing imports nothing."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from keelwright.core import catalogue as shelves
from keelwright.core.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("line", shelves.catalogue().values(), ids=lambda line: line.name)
def test_every_line_names_a_class_in_its_own_room(line):
    loaded = line.load()
    assert loaded.__module__ == f"keelwright.{line.room}.{line.name}"
    assert line.name == line.name.lower()


@pytest.mark.parametrize("line", shelves.catalogue().values(), ids=lambda line: line.name)
def test_docstring_names_source_equation_differences_cost_and_limits(line):
    text = importlib.import_module(line.load().__module__).__doc__
    for heading in ("Source", "Equation", "Differs from the official code", "Cost", "Limits"):
        assert heading in text
    assert line.source.split()[-1] in text


def test_every_method_file_of_the_repair_room_is_in_the_catalogue():
    tree = ROOT / "src" / "keelwright" / "repair"
    texts = {path.stem: path.read_text(encoding="utf-8") for path in tree.glob("*.py")}
    with_config = {name for name, text in texts.items() if "search_space: ClassVar" in text}
    assert with_config == {line.name for line in shelves.catalogue().values() if line.room == "repair"}


def test_json_list_has_the_contract_keys_and_does_not_import_torch():
    code = (
        "import sys; sys.argv = ['keelwright', 'methods', '--json']\n"
        "from keelwright.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout)
    keys = {"name", "room", "title", "source", "status", "needs", "passes_per_step"}
    assert {"linear", "resta"} <= {row["name"] for row in rows}
    assert all(set(row) == keys for row in rows)


def test_misspelt_method_is_answered_with_the_nearest_name():
    with pytest.raises(ConfigError, match="did you mean 'resta'"):
        shelves.find_method("rest", room="repair")


def test_entry_point_joins_the_catalogue(monkeypatch):
    line = shelves.MethodLine("outside", "repair", "t", "s", "faithful", (), 0, "x:Y")

    class Point:
        name, value = "outside", "package:LINE"

        def load(self):
            return line

    monkeypatch.setattr(shelves, "entry_points", lambda group: [Point()])
    shelves.catalogue.cache_clear()
    try:
        assert shelves.find_method("outside") is line
        line = "no method line"
        shelves.catalogue.cache_clear()
        with pytest.raises(ConfigError, match="cannot join the catalogue"):
            shelves.catalogue()
    finally:
        monkeypatch.undo()
        shelves.catalogue.cache_clear()
