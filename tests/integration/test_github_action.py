# SPDX-License-Identifier: Apache-2.0
"""The GitHub Action: its own shell step, run on real runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, keelwright):
    """Audit the aligned organism against itself, and the base against the aligned one."""
    folder = tmp_path_factory.mktemp("runs")
    for name, model in (("same", "lab:workshop/aligned"), ("worse", "lab:workshop/base")):
        words = ("audit", model, "--against", "lab:workshop/aligned", "--limit", 100, "--out", name, "--quiet")
        keelwright(*words, cwd=folder)
    return folder


def run_step(folder: Path, **inputs: str) -> tuple[int, dict[str, str], str]:
    """Run the step `gate` of action.yml as a runner would; return status, outputs and summary."""
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    (step,) = [one for one in action["runs"]["steps"] if one.get("id") == "gate"]
    given = {name: one.get("default", "") for name, one in action["inputs"].items()} | inputs
    variables = {name: given[expression.split(".")[1].split()[0]] for name, expression in step["env"].items()}
    output, summary = folder / "output", folder / "summary"
    for file in (output, summary):
        file.write_text("")
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", step["run"]],
        cwd=folder,
        env={
            **os.environ,
            **variables,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "GITHUB_OUTPUT": str(output),
            "GITHUB_STEP_SUMMARY": str(summary),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    outputs = dict(line.split("=", 1) for line in output.read_text().splitlines())
    return done.returncode, outputs, summary.read_text()


@pytest.mark.parametrize(("run", "code", "outcome"), [("same", 0, "pass"), ("worse", 4, "fail")])
def test_the_step_ends_as_the_gate_does_and_tells_the_page(runs, run, code, outcome):
    status, outputs, summary = run_step(runs, run=run, junit=f"{run}.xml", markdown=f"{run}.md")
    assert (status, outputs) == (code, {"outcome": outcome})
    assert summary.startswith("## Safety gate: ")
    assert (runs / f"{run}.xml").is_file()


def test_too_few_items_are_not_measurable(runs):
    policy = runs / "strict.yaml"
    policy.write_text("rules: [{metric: primary, detect: 0.01}]\n")
    status, outputs, summary = run_step(runs, run="same", policy=str(policy))
    assert (status, outputs["outcome"]) == (6, "not measurable")
    assert "it takes" in summary


def test_a_run_that_is_not_there_ends_with_the_gates_own_status(runs):
    status, outputs, _ = run_step(runs, run="nowhere")
    assert (status, outputs) == (2, {})
