# SPDX-License-Identifier: Apache-2.0
"""The house stands as drawn: sizes, licence lines, import contracts, no work at import."""

import ast
import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src" / "keelwright").rglob("*.py"))
EVERY_PYTHON_FILE = sorted([*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])
FILE_LIMIT, FUNCTION_LIMIT, CONFIG_LIMIT = 600, 100, 25


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", EVERY_PYTHON_FILE, ids=name_of)
def test_file_carries_its_licence_and_stays_within_its_size(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# SPDX-License-Identifier: Apache-2.0"
    assert len(lines) <= FILE_LIMIT


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_functions_and_configs_stay_within_their_sizes(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= FUNCTION_LIMIT, node.name
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
            fields = [one for one in node.body if isinstance(one, ast.AnnAssign)]
            assert len(fields) <= CONFIG_LIMIT, node.name


def test_there_is_no_file_named_utils():
    assert not [path for path in EVERY_PYTHON_FILE if path.stem in {"utils", "helpers", "misc", "common"}]


def test_imports_point_one_way():
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-logo", "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_room_is_in_the_import_contract():
    import tomllib

    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    layers = " ".join(contract["layers"]).replace("|", " ").replace("(", " ").replace(")", " ").split()
    rooms = {path.parent.name for path in (ROOT / "src" / "keelwright").glob("*/__init__.py")}
    assert rooms <= set(layers)


@pytest.mark.parametrize("module", ["keelwright", "keelwright.cli.app", "keelwright.runs.folder"])
def test_import_loads_neither_torch_nor_numpy_nor_transformers(module):
    heavy = "{'torch', 'numpy', 'transformers', 'peft', 'accelerate'}"
    code = f"import sys, {module}; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names_resolve():
    package = importlib.import_module("keelwright")
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'repare'"):
        package.repare  # noqa: B018


def test_configs_are_frozen_and_documented():
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            if not (isinstance(node, ast.ClassDef) and node.name.endswith("Config")):
                continue
            parts = path.relative_to(ROOT / "src").with_suffix("").parts
            config = getattr(importlib.import_module(".".join(parts)), node.name)
            assert dataclasses.is_dataclass(config)
            assert config.__dataclass_params__.frozen, node.name
            for here, after in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(here, ast.AnnAssign):
                    assert isinstance(after, ast.Expr), f"{node.name}.{here.target.id} has no docstring"
