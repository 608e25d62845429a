# SPDX-License-Identifier: Apache-2.0
"""Arms of a run that trains and measures: where their lines begin, and what is told apart."""

import importlib.util
from pathlib import Path

import pytest

from keelwright.report.tuning_reading import lines_of, read_tuning

_SPEC = importlib.util.spec_from_file_location("tuning_sample", Path(__file__).with_name("tuning_sample.py"))
sample = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(sample)


def test_a_defended_line_begins_at_the_hardened_model_and_the_undefended_at_the_start():
    summary = sample.summary()
    hardened = next(row for row in summary["rows"] if row["stage"] == "hardening")
    hardened["metrics"]["harm_rate"] = {"value": 0.2, "low": 0.1, "high": 0.3, "n": 120}
    lines = {one.name: one.spots for one in lines_of(read_tuning(summary), "harm_rate")}
    assert (lines["Booster"][0].x, lines["Booster"][0].value) == (0.0, 0.2)
    assert (lines["Undefended"][0].x, lines["Undefended"][0].value) == (0.0, 0.0)
    assert [spot.x for spot in lines["Undefended"]] == [0, 25, 50, 75, 100]
    assert (lines["Undefended"][-1].low, lines["Undefended"][-1].high) == pytest.approx((0.8952, 0.9769), abs=1e-3)


def test_a_start_in_another_frame_begins_no_line():
    summary = sample.summary(arms=("undefended",))
    for row in summary["rows"][1:]:
        row["asking"] = "persona 12ab"
    assert lines_of(read_tuning(summary), "harm_rate")[0].spots[0].x == 25


def test_several_seeds_are_a_mean_with_their_range():
    lines = {one.name: one.spots for one in lines_of(read_tuning(sample.summary(seeds=3)), "harm_rate")}
    last = lines["Booster"][-1]
    assert (last.low, last.value, last.high) == pytest.approx((0.15, 0.2, 0.25))


def test_one_measurement_among_several_seeds_has_no_band_that_would_pass_for_their_range():
    first = lines_of(read_tuning(sample.summary(seeds=3)), "harm_rate")[0].spots[0]
    assert first.low == first.value == first.high
    assert "(0 to 3.10%, n = 120)" in first.tip


def test_stages_of_one_stress_follow_each_other():
    rows = [sample.row("start", 0, 0.0, stage="start")]
    rows += [
        {**sample.row("undefended", step, 0.1), "stage": stage} for stage in ("first", "second") for step in (5, 10)
    ]
    (line,) = lines_of(read_tuning({"rows": rows}), "harm_rate")
    assert [spot.x for spot in line.spots] == [0, 5, 10, 15, 20]


def test_arms_with_stages_of_their_own_begin_together():
    rows = [sample.row("start", 0, 0.0, stage="start")]
    rows += [{**sample.row("undefended", step, 0.1), "stage": "in the style"} for step in (5, 10)]
    rows += [{**sample.row("trained plainly", step, 0.1), "stage": "without the style"} for step in (5, 10)]
    lines = lines_of(read_tuning({"rows": rows}), "harm_rate")
    assert [[spot.x for spot in line.spots] for line in lines] == [[0, 5, 10], [0, 5, 10]]


def test_an_arm_that_was_measured_in_the_last_stage_only_stands_where_the_others_do():
    rows = [
        {**sample.row("undefended", step, 0.1), "stage": stage} for stage in ("first", "second") for step in (5, 10)
    ]
    alone = [{**sample.row("asked plainly", 10, 0.1), "stage": "second"}]
    for given in ([*alone, *rows], [*rows, *alone]):
        lines = {one.name: one.spots for one in lines_of(read_tuning({"rows": given}), "harm_rate")}
        assert [spot.x for spot in lines["Asked plainly"]] == [20]
        assert [spot.x for spot in lines["Undefended"]] == [5, 10, 15, 20]


def test_a_dose_is_named_as_it_is_typed():
    assert [arm.title for arm in read_tuning({"rows": [sample.row("k = 50", 5, 0.1)]}).arms] == ["k = 50"]


def test_one_start_of_several_stresses_stands_in_the_tables_once_and_arms_are_told_apart():
    arms = read_tuning(sample.two_stresses()).arms
    assert [arm.name for arm in arms] == [
        "Start", "Undefended, poison", "Booster, poison", "Undefended, virus", "Booster, virus", "Positive control",
    ]  # fmt: skip
    assert arms[1].class_ == arms[3].class_ != arms[2].class_


def test_the_control_is_no_stress_of_its_own():
    summary = sample.summary()
    summary["rows"].append({**sample.row("positive control", 25, 1.0), "stress": "known to break", "stage": "control"})
    reading = read_tuning(summary)
    assert reading.stresses == ("poison",)
    assert [arm.name for arm in reading.arms] == ["Start", "Undefended", "Booster", "Positive control"]
