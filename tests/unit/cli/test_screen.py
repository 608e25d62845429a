# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import typer

from keelwright.cli.screen import ScreenProgress, errors_as_exit_codes, estimate_text, metrics_table, stdout_console
from keelwright.core.errors import ConfigError, GateFailed, OfflineError

RATE = {"value": 0.64, "low": 0.581, "high": 0.695, "n": 150}


def shown(capsys):
    """What went to stderr, without seconds."""
    lines = capsys.readouterr().err.splitlines()
    return [line.rsplit("  (", 1)[0] if line.endswith("s)") else line for line in lines]


def test_lines_off_a_terminal_come_in_order(capsys):
    with ScreenProgress(quiet=False) as progress:
        progress.plan("keelwright heal", [("aligned", "a [/b]"), ("network", "nothing leaves")])
        progress.stage("asking aligned", total=2, unit="answers")
        progress.advance(2)
        progress.note("one pass takes 1 s")
        progress.stage("asking linear coefficient=0.2", total=2, unit="answers")
        progress.advance(2)
        progress.result("linear coefficient=0.2: harm rate 0.1")
        progress.stage("write")
    assert shown(capsys) == [
        "keelwright heal",
        "  aligned  a [/b]",
        "  network  nothing leaves",
        "",
        "  asking aligned",
        "  one pass takes 1 s",
        "  linear coefficient=0.2: harm rate 0.1",
        "  write",
    ]


def test_a_note_in_mid_stage_does_not_end_it(capsys):
    with ScreenProgress(quiet=False) as progress:
        progress.stage("reading", total=2, unit="windows")
        progress.advance()
        progress.note("3 left out")
        progress.advance()
    assert shown(capsys) == ["  3 left out", "  reading"]


def test_a_finished_stage_says_how_many_and_how_long(capsys):
    with ScreenProgress(quiet=False) as progress:
        progress.stage("asking", total=1500, unit="answers")
        progress.advance(1500)
    line = capsys.readouterr().err
    assert line.startswith("  asking  (1,500 answers, ")
    assert line.endswith(" s)\n")


def test_a_result_without_a_stage_has_no_seconds(capsys):
    with ScreenProgress(quiet=False) as progress:
        progress.result("linear coefficient=0.2: known from before")
        progress.stage("asking", total=1, unit="answers")
        progress.result("one")
        progress.result("two")
        progress.advance()
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == "  linear coefficient=0.2: known from before"
    assert second.endswith(" s)")
    assert third == "  two"


def test_a_live_bar_survives_results_notes_and_late_counts(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with ScreenProgress(quiet=False) as progress:
        assert progress._live
        progress.stage("asking [/model]", total=3, unit="answers")
        progress.advance(2)
        progress.result("linear [/x]")
        progress.advance()
        progress.note("late")
        progress.stage("write")
    assert "linear [/x]" in capsys.readouterr().err


def test_quiet_says_nothing(capsys):
    with ScreenProgress(quiet=True) as progress:
        progress.plan("keelwright heal", [("aligned", "a")])
        progress.stage("asking", total=1)
        progress.advance()
        progress.note("note")
        progress.result("result")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("kind", "code"), [(ConfigError, 2), (OfflineError, 3), (GateFailed, 4)])
def test_an_error_leaves_with_its_code_and_says_what_to_do(kind, code, capsys):
    with pytest.raises(typer.Exit) as left, errors_as_exit_codes(as_json=False):
        raise kind("Wrong.", expected="this", found="that", fix="do so")
    assert left.value.exit_code == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"{kind.__name__}: Wrong.\n  expected: this\n  found:    that\n  fix:      do so\n"


def test_an_error_is_one_json_document_with_its_notes(capsys):
    with pytest.raises(typer.Exit), errors_as_exit_codes(as_json=True):
        error = OfflineError("Wrong.", expected="this", fix="do so")
        error.add_note("What was measured is kept.")
        raise error
    out, err = capsys.readouterr()
    assert json.loads(out) == {
        "schema": 1,
        "error": {
            "type": "OfflineError", "exit_code": 3, "problem": "Wrong.", "expected": "this", "found": None,
            "fix": "do so", "notes": ["What was measured is kept."],
        },
    }  # fmt: skip
    assert "What was measured is kept." in err


@pytest.mark.parametrize("as_json", [True, False])
def test_ctrl_c_leaves_130_and_says_where_the_work_is(as_json, capsys):
    with pytest.raises(typer.Exit) as left, errors_as_exit_codes(as_json=as_json):
        stopped = KeyboardInterrupt()
        stopped.add_note("the same command with --run r resumes.")
        raise stopped
    assert left.value.exit_code == 130
    out, err = capsys.readouterr()
    assert err == "\nInterrupted.\nthe same command with --run r resumes.\n"
    assert (json.loads(out)["error"]["exit_code"] == 130) if as_json else out == ""


def test_a_bug_is_not_hidden():
    with pytest.raises(ZeroDivisionError), errors_as_exit_codes(as_json=True):
        raise ZeroDivisionError


def test_rates_carry_their_interval():
    assert estimate_text(RATE) == "64.0% [58.1, 69.5]"
    assert estimate_text(None) == "not measured"


def test_table_has_a_column_per_model_and_only_rows_with_figures(capsys):
    missing = dict.fromkeys(("refusal_rate", "over_refusal", "answer_rate", "incoherent", "utility"))
    columns = {"aligned": {"harm_rate": RATE, **missing}, "repaired": None}
    stdout_console().print(metrics_table({"models": columns, "utility": {"name": "task:mood", "scorer": "exact"}}))
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0].split() == ["aligned", "repaired"]
    assert lines[1] == "harm rate (lower is better)  64.0% [58.1, 69.5]         -"
    assert len(lines) == 2


def test_ratio_of_perplexities_is_no_percentage():
    assert estimate_text({"value": 0.981, "low": 0.97, "high": 0.992}, as_ratio=True) == "0.981 [0.970, 0.992]"
