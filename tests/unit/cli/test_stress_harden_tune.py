# SPDX-License-Identifier: Apache-2.0
"""`stress`, `harden` and `tune` as typed: options mean what the config means, and results and exit codes are told."""

import dataclasses
import importlib.util
import inspect
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from keelwright.arena.config import TuningConfig
from keelwright.cli import tuning_options as own
from keelwright.cli.app import app
from keelwright.cli.harden import harden
from keelwright.cli.stress import stress
from keelwright.cli.tune import EXIT_CODES, tune
from keelwright.cli.tuning_results import last_models, show_tuning
from keelwright.core.errors import ConfigError, DataError
from keelwright.data.row_sets import FLAGS, ROLES

RUN = CliRunner()
_PATH = Path(__file__).parents[1] / "report" / "tuning_sample.py"
_SPEC = importlib.util.spec_from_file_location("tuning_sample", _PATH)
sample = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(sample)

ONE_RUN = {"seeds", "harden_steps", "harden_lr", "harden_batch"}
"""What `tune` has no use for: it trains once, and nothing beforehand."""


@pytest.fixture
def called(monkeypatch):
    """Replace the three functions behind the commands; returns what they were called with."""
    calls = {}

    def stand_in(command, summary):
        def run(*args, **given):
            calls[command] = (args, given)
            return summary

        return run

    for command, summary in (
        ("stress", sample.summary()),
        ("harden", sample.summary("harden")),
        ("tune", sample.tune_summary()),
    ):
        module = importlib.import_module(f"keelwright.arena.{command}")
        monkeypatch.setattr(module, command, stand_in(command, summary))
    return calls


@pytest.mark.parametrize(("command", "without"), [(stress, set()), (harden, set()), (tune, ONE_RUN)])
def test_every_setting_is_an_option_with_the_same_default(command, without):
    options = inspect.signature(command).parameters
    for field in dataclasses.fields(TuningConfig):
        if field.name in without:
            assert field.name not in options
        elif field.name in ("judges", "at"):
            assert not options[field.name].default
        else:
            assert options[field.name].default == field.default, field.name


@pytest.mark.parametrize("command", [stress, harden, tune])
def test_every_role_of_rows_has_its_flag(command):
    options = inspect.signature(command).parameters
    assert {flag.removeprefix("--") for flag in FLAGS.values()} <= set(options)
    given = {flag.removeprefix("--"): Path(f"{role}.jsonl") for role, flag in FLAGS.items()}
    assert own.files_of(given) == {role: f"{role}.jsonl" for role in ROLES}


def test_settings_of_a_command_make_a_config():
    given = {name: one.default for name, one in inspect.signature(stress).parameters.items()}
    made = TuningConfig(**own.settings_of({**given, "at": "25, 50", "judges": ["refusal-lists"]}))
    assert made == TuningConfig(at=(25, 50), judges=("refusal-lists",))


@pytest.mark.parametrize("text", ["25,x", "2.5", "-3", "²"])
def test_steps_that_are_no_numbers_are_refused(text):
    with pytest.raises(ConfigError, match="'--at' is not understood"):
        own.steps_of(text)


def test_a_stress_hands_over_kinds_defences_rows_and_settings(called):
    words = ["stress", "poison,virus", "m", "--defence", "booster", "--defence", "lisa", "--harmful", "h.jsonl"]
    words += ["--set", "booster.alpha=0.05", "--at", "10,20", "--seeds", "3", "--lr", "5e-5", "--run", "r"]
    done = RUN.invoke(app, words)
    assert done.exit_code == 0, done.output
    args, given = called["stress"]
    assert args == (["poison", "virus"], "m")
    assert given["defences"] == ["booster", "lisa"]
    assert given["files"] == {"harmful": "h.jsonl"}
    assert given["method_settings"]["booster"] == {"alpha": 0.05}
    assert (given["at"], given["seeds"], given["lr"], str(given["run"])) == ((10, 20), 3, 5e-5, "r")


def test_harden_hands_over_method_place_and_stresses(called):
    done = RUN.invoke(app, ["harden", "booster", "m", "--out", "o", "--stress", "poison", "--set", "booster.alpha=0.1"])
    assert done.exit_code == 0, done.output
    args, given = called["harden"]
    assert args == ("booster", "m")
    assert (str(given["out"]), given["stresses"]) == ("o", ["poison"])
    assert given["method_settings"] == {"booster": {"alpha": 0.1}, "poison": {}}


def test_tune_hands_over_rows_defence_and_policy(called):
    RUN.invoke(app, ["tune", "m", "--data", "d.jsonl", "--out", "o", "--defence", "lisa", "--policy", "p.yaml"])
    args, given = called["tune"]
    assert args == ("m",)
    assert (str(given["data"]), given["defence"], given["policy"]) == ("d.jsonl", "lisa", "p.yaml")
    assert "user" not in given["files"]
    assert not ONE_RUN & set(given)


@pytest.mark.parametrize(("outcome", "code"), [("pass", 0), ("fail", 4), ("not measurable", 6)])
def test_tune_leaves_with_the_code_of_its_gate(called, monkeypatch, outcome, code):
    summary = sample.tune_summary()
    summary["gate"]["outcome"] = outcome
    monkeypatch.setattr(importlib.import_module("keelwright.arena.tune"), "tune", lambda *_, **__: summary)
    for words in ([], ["--json"]):
        assert RUN.invoke(app, ["tune", "m", "--data", "d", "--out", "o", *words]).exit_code == code
    assert int(EXIT_CODES[outcome]) == code


@pytest.mark.parametrize(
    "words",
    [["stress", "poison", "m"], ["harden", "booster", "m", "--out", "o"], ["tune", "m", "--data", "d", "--out", "o"]],
)
def test_json_is_the_summary_and_nothing_else(called, words):
    done = RUN.invoke(app, [*words, "--json"])
    assert json.loads(done.stdout)["command"] == words[0]


def test_an_error_is_one_document_with_its_exit_code(monkeypatch):
    def refuse(*_, **__):
        raise DataError("'poison' needs 'harmful' rows.", expected="--harmful FILE", found="none", fix="give it")

    monkeypatch.setattr(importlib.import_module("keelwright.arena.stress"), "stress", refuse)
    done = RUN.invoke(app, ["stress", "poison", "m", "--json"])
    assert done.exit_code == 2
    assert json.loads(done.stdout)["error"]["problem"] == "'poison' needs 'harmful' rows."


@pytest.mark.parametrize("words", [["harden", "booster", "m"], ["tune", "m", "--out", "o"]])
def test_a_place_and_rows_must_be_named(words):
    assert RUN.invoke(app, words).exit_code == 2


def test_the_result_names_every_arm_with_intervals_and_where_the_page_is(capsys):
    show_tuning({**sample.summary(), "sentence": "It held [/b]."})
    out = capsys.readouterr().out
    assert out.startswith("It held [/b].\n")
    assert "harm rate (lower is better)" in out
    assert "95.0% [89.5, 97.7]" in out
    for words in ("Start", "Undefended", "Booster", "ordinary requests answered", "incoherent answers"):
        assert words in out
    assert "report  runs/stress/report.html" in out


def test_a_gate_is_printed_rule_by_rule_with_the_place_of_the_model(capsys):
    show_tuning(sample.tune_summary())
    out = capsys.readouterr().out
    assert "fail            refusal_rate got worse" in out
    assert "model   tuned-out" in out


def test_the_knee_and_each_interaction_have_a_line_and_other_runs_have_none(capsys):
    show_tuning(sample.knee_summary())
    assert "\nknee    k = 50 (within 2 points of 0% at k = 300): harm rate 1.00%" in capsys.readouterr().out
    show_tuning(sample.style_summary())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("style ")]
    assert lines[1] == "style   style_shift, seed 1: interaction +80.0 points [40.0, 120]"
    assert len(lines) == 3
    show_tuning({**sample.summary(), "knee": None, "styles": []})
    assert not any(line.startswith(("knee ", "style ")) for line in capsys.readouterr().out.splitlines())


def test_of_several_seeds_the_first_is_shown_and_says_so():
    shown = last_models(sample.summary(seeds=3))
    assert list(shown) == ["Start", "Undefended, seed 0", "Booster, seed 0"]
    assert shown["Booster, seed 0"]["harm_rate"]["value"] == pytest.approx(0.15)
