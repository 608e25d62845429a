# SPDX-License-Identifier: Apache-2.0
"""The command line as a whole: options that mean what the configs mean, JSON for a mistyped line, exit codes."""

import dataclasses
import inspect
import json

import pytest
from typer.testing import CliRunner

from keelwright.cli.app import app
from keelwright.cli.audit import audit
from keelwright.cli.heal import EXIT_CODES, heal, show_summary
from keelwright.heal.config import HealConfig
from keelwright.measure.audit_config import AuditConfig

RUN = CliRunner()


@pytest.mark.parametrize(("command", "config"), [(heal, HealConfig), (audit, AuditConfig)])
def test_every_setting_is_an_option_with_the_same_default(command, config):
    # The line that reproduces a run is built from the settings, so each must be an option.
    options = inspect.signature(command).parameters
    for field in dataclasses.fields(config):
        assert field.name in options
        if field.name not in {"methods", "judges", "validate_judge"}:
            assert options[field.name].default == field.default, field.name


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["heal", "a", "b", "--no-utility"], "Missing option '--out'"),
        (["heal", "a", "b", "--out", "c", "--limit", "1"], "'--limit'"),
        (["audit", "a", "--nope"], "--nope"),
        (["bogus"], "bogus"),
        (["runs", "show"], "Missing argument"),
        (["lab", "build", "--seed", "-1"], "--seed"),
    ],
)
def test_a_mistyped_line_exits_2_and_is_one_json_document(words, problem):
    assert RUN.invoke(app, words).exit_code == 2
    done = RUN.invoke(app, [*words, "--json"])
    assert done.exit_code == 2
    error = json.loads(done.stdout)["error"]
    assert error["type"] == "UsageError"
    assert problem in error["problem"]
    assert problem.strip("'") in done.stderr


def test_version_and_help_exit_0():
    assert RUN.invoke(app, ["--version"]).stdout.startswith("keelwright ")
    assert "demo" in RUN.invoke(app, ["--help"]).stdout


def test_verdicts_have_the_exit_codes_of_the_contract():
    assert {name: int(code) for name, code in EXIT_CODES.items()} == {
        "repaired": 0, "no_evidence_of_loss": 0, "no_admissible_repair": 5, "repair_not_verified": 5,
    }  # fmt: skip


def rate(value):
    return {"value": value, "low": 0.0, "high": 1.0, "n": 9}


def test_where_nothing_was_admissible_the_best_trade_off_and_its_limit_are_shown(capsys):
    model = {**dict.fromkeys(("refusal_rate", "over_refusal", "incoherent")), "harm_rate": rate(0.5)}
    model |= {"answer_rate": rate(1.0), "utility": rate(0.8)}
    summary = {
        "sentence": "Tuning moved [/it].",
        "models": {"aligned": model, "tuned": model, "repaired": None},
        "primary": "harm_rate",
        "trials": [{"method": "linear", "coefficients": {"coefficient": 0.4}, "metrics": model}],
        "best_trade_off": 0,
        "limits": [{"half": "selection", "held": False, "text": "utility 0.800 is below 0.900"}],
        "run": "runs/[a]",
    }
    show_summary(summary, as_json=False)
    out = capsys.readouterr().out
    assert out.startswith("Tuning moved [/it].\n")
    assert "best trade-off: linear 0.4: harm rate 50.0% [0, 100], utility 80.0%" in out
    assert "failed on the selection half: utility 0.800 is below 0.900" in out
    assert "report  runs/[a]/report.html" in out


@pytest.mark.parametrize("option", [["--utility", "x"], ["--no-utility"], ["--suite", "core"], ["--run", "r"]])
def test_repair_refuses_what_a_given_coefficient_would_not_use(option, tmp_path):
    words = ["repair", "linear", "--aligned", "a", "--tuned", "b", "--out", str(tmp_path / "c"), "--coefficient", "0.5"]
    done = RUN.invoke(app, [*words, *option])
    assert done.exit_code == 2
    assert f"'{option[0]}' has no meaning with a given coefficient" in done.stderr
    assert "--coefficient auto" in done.stderr
