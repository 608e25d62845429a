# SPDX-License-Identifier: Apache-2.0
"""Every command in the README runs as it stands, in the order in which it stands there."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(?:console|bash|sh)\n(.*?)```", README, flags=re.S)
LINES = [
    line.removeprefix("$ ").split("  #")[0].strip()
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith(("$ ", "keelwright ", "make ", "pip "))
]


def test_readme_shows_commands():
    assert sum(line.startswith("keelwright ") for line in LINES) >= 6


@pytest.mark.parametrize("line", sorted({line for line in LINES if line.startswith("make ")}))
def test_make_targets_exist(line):
    done = subprocess.run([*shlex.split(line), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_keelwright_commands_run_in_order(keelwright, tmp_path):
    for line in LINES:
        if line.startswith("keelwright "):
            keelwright(*shlex.split(line)[1:], cwd=tmp_path)


def test_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    scope: dict[str, object] = {}
    exec(code, scope)  # our own README
    assert scope["summary"]["models"]
