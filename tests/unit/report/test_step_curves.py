# SPDX-License-Identifier: Apache-2.0
"""Figures over steps: one per stress, the right axis, and courses with gaps."""

import importlib.util
from pathlib import Path

from keelwright.report.step_curves import step_curves, training_curve
from keelwright.report.tuning_reading import lines_of, read_tuning
from keelwright.report.tuning_tables import results_tables

_SPEC = importlib.util.spec_from_file_location("tuning_sample", Path(__file__).with_name("tuning_sample.py"))
sample = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(sample)


def test_several_stresses_have_a_figure_each_with_the_control_in_both():
    figures = step_curves(read_tuning(sample.two_stresses()))
    assert [title for title, _ in figures] == ["poison", "virus"]
    for _, figure in figures:
        assert [entry.text for entry in figure.legend] == ["Undefended", "Booster", "Positive control"]


def test_a_hardening_alone_is_drawn_over_its_own_steps():
    rows = [sample.row("start", 0, 0.0, stage="start"), sample.row("booster", 100, 0.1, stage="hardening")]
    reading = read_tuning({"rows": rows})
    (line,) = lines_of(reading, "harm_rate")
    assert [spot.x for spot in line.spots] == [0, 100]
    assert "Steps of the hardening" in str(step_curves(reading)[0][1].panels[0].wide)


def test_without_a_harm_judge_refusals_are_the_primary_metric():
    summary = sample.summary()
    summary["primary"] = None
    for row in summary["rows"]:
        row["metrics"]["harm_rate"] = None
    reading = read_tuning(summary)
    assert reading.primary == "refusal_rate"
    assert "Refusal rate, higher is better" in str(step_curves(reading)[0][1].panels[0].wide)
    assert "not measured" not in str(results_tables(reading)[0].columns)


def test_steps_without_a_number_are_left_out_of_a_curve_and_named_in_its_table():
    summary = sample.tune_summary()
    summary["log"] = {"losses": [1.0, float("nan"), None, 0.5], "figures": {"empty": [None, None]}}
    figure = training_curve(read_tuning(summary))
    assert "nan" not in str(figure.panels[0].wide)
    assert [row[1].text for row in figure.table.rows] == ["1.00", "not measured", "not measured", "0.500"]


def test_a_long_log_is_drawn_with_few_points():
    summary = sample.tune_summary()
    summary["log"] = {"losses": [1.0] * 5000, "figures": {}}
    figure = training_curve(read_tuning(summary))
    assert str(figure.panels[0].wide).count("L") < 300
    assert len(figure.table.rows) < 20
