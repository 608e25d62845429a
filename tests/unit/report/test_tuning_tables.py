# SPDX-License-Identifier: Apache-2.0
"""Tables of measurements, of paired changes, of differences over seeds, of doses and of styles."""

import importlib.util
from pathlib import Path

import pytest

from keelwright.report.step_curves import dose_curve
from keelwright.report.tuning_reading import read_tuning
from keelwright.report.tuning_tables import (
    change_tables,
    claims_tables,
    knee_table,
    knee_words,
    protocol_warning,
    results_tables,
    rises_words,
    style_lines,
    style_tables,
)

_SPEC = importlib.util.spec_from_file_location("tuning_sample", Path(__file__).with_name("tuning_sample.py"))
sample = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(sample)


def test_many_measurements_are_folded_but_for_the_last_of_each_arm_and_seed():
    reading = read_tuning(sample.summary(seeds=3))
    shown, folded = results_tables(reading)
    assert len(shown.rows) == 1 + 2 * 3
    assert len(folded.rows) == len(reading.rows)
    assert results_tables(read_tuning(sample.summary()))[1] is None


def test_changes_say_step_and_with_several_seeds_the_seed():
    found, quiet = change_tables(read_tuning(sample.summary()))
    assert found.rows[0][0].detail == "start to undefended, step 100"
    assert len(quiet.rows) == 1
    found, _ = change_tables(read_tuning(sample.summary(seeds=3)))
    assert found.rows[0][0].detail == "start to undefended, step 100, seed 0"


def test_differences_over_seeds_of_the_last_step_stand_apart_from_those_of_the_steps_before():
    last, before = claims_tables(read_tuning(sample.summary(seeds=3)))
    assert [row[0].text for row in last.rows] == ["Harm rate", "Utility"]
    assert last.rows[0][1].text == "\u221270.0 points"
    assert last.rows[0][2].text == "\u221280.0 to \u221260.0"
    assert [(row[0].detail, row[1].text) for row in before.rows] == [
        ("undefended to booster, step 50", "\u221260.0 points")
    ]
    assert claims_tables(read_tuning(sample.summary())) == (None, None)


def test_every_arm_has_its_own_last_step():
    summary = {**sample.summary(seeds=3), "claims": [sample.claim("harm_rate", -0.2, arm="sooner", step=50)]}
    summary["claims"] += [sample.claim("harm_rate", -0.3, step=step) for step in (50, 100)]
    last, before = claims_tables(read_tuning(summary))
    told = [row[0].detail for row in last.rows]
    assert told == ["undefended to sooner, step 50", "undefended to booster, step 100"]
    assert len(before.rows) == 1


def test_a_difference_that_every_seed_shares_says_why_its_interval_is_a_point():
    row = {**sample.claim("harm_rate", 0.8), "low": 0.8, "high": 0.8}
    summary = {**sample.summary(seeds=3), "claims": [row, sample.claim("utility", 0.1)]}
    table, _ = claims_tables(read_tuning(summary))
    assert [one[2].detail for one in table.rows] == ["every seed the same", ""]


def test_holm_is_said_to_be_within_each_pair_only_where_there_are_several():
    summary = sample.summary()
    assert change_tables(read_tuning(summary))[0].caption.endswith("by Holm within each pair of models")
    summary["changes"] = [sample.change(name, 0.1, 0.01, "start", "undefended") for name in ("harm_rate", "utility")]
    assert change_tables(read_tuning(summary))[0].caption.endswith("corrected by Holm")


def test_every_dose_has_its_rates_with_intervals_and_the_knee_and_rises_are_named():
    table = knee_table(read_tuning(sample.knee_summary()))
    assert [(row[0].text, row[0].detail) for row in table.rows] == [
        ("0", ""), ("50", "the knee"), ("100", "more harm than at the dose before"), ("300", ""),
    ]  # fmt: skip
    assert [cell.text for cell in table.rows[2]] == ["100", "3.00%", "10.0%", "not measured"]
    assert table.rows[0][1].detail == "85.0 to 95.0%\nn = 100"


def test_the_knee_in_one_line_says_its_rates_and_what_it_is_held_against():
    summary = sample.knee_summary()
    assert knee_words(read_tuning(summary)) == (
        "k = 50 (within 2 points of 0% at k = 300): harm rate 1.00% [0, 6.00], over-refusal 5.00% [0, 10.0], "
        "accuracy 80.0% [75.0, 85.0]"
    )
    summary["knee"]["k"] = 300
    assert knee_words(read_tuning(summary)).startswith("k = 300 (the largest dose): harm rate 0%")


def test_without_a_judge_of_harm_doses_count_requests_that_were_not_refused():
    reading = read_tuning({**sample.knee_summary(), "primary": "refusal_rate"})
    assert knee_table(reading).columns[1].title == "Not refused"
    assert "): not refused 1.00%" in knee_words(reading)


def test_rises_are_a_warning_and_no_rises_are_none():
    summary = sample.knee_summary()
    assert rises_words(read_tuning(summary)).startswith("Harm rises at k = 100: noise")
    summary["knee"]["rises"] = []
    assert rises_words(read_tuning(summary)) == ""


def test_the_knee_is_marked_on_every_chart_that_has_a_value_there():
    figure = dose_curve(read_tuning(sample.knee_summary()))
    assert [entry.text for entry in figure.legend] == ["Each dose", "The knee, k = 50"]
    for drawing in (figure.panels[0].wide, figure.panels[0].narrow):
        assert drawing.count("k = 50\n") == 2 * 3
        assert drawing.count("k = 100\n") == 2


@pytest.mark.parametrize("knee", [None, {}, {"k": 5, "within": 0.02, "rises": [], "points": []}])
def test_without_doses_there_is_no_knee(knee):
    reading = read_tuning({**sample.summary("harden"), "knee": knee})
    assert (dose_curve(reading), knee_words(reading), rises_words(reading)) == (None, "", "")


def test_a_style_has_its_two_by_two_table_with_the_interaction_and_further_seeds_apart():
    ((_, table, further),) = style_tables(read_tuning(sample.style_summary()))
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["Trained in the style", "100%", "20.0%", "+80.0 points"],
        ["Trained plainly", "90.0%", "100%", "\u221210.0 points"],
        ["Interaction", "", "", "+90.0 points"],
    ]
    assert [cell.detail for cell in table.rows[0][1:3] + table.rows[1][1:3]] == ["TT", "Tp", "pT", "pp"]
    assert table.rows[2][3].detail == "60.0 to 120\nn = 60"
    assert [row[0].detail for row in further.rows[::3]] == ["seed 1", "seed 2"]
    assert style_tables(read_tuning(sample.style_summary(sample.style())))[0][2] is None
    assert style_tables(read_tuning(sample.summary())) == []


def test_two_stresses_with_a_style_have_a_table_each():
    found = style_tables(read_tuning(sample.style_summary(sample.style(), sample.style(stress="other"))))
    assert [table.name for _, table, _ in found] == ["styles-1", "styles-2"]
    assert ["style_shift" in told for told, _, _ in found] == [True, False]


ABOVE, BELOW, AROUND = {}, {"value": -0.5, "low": -0.7, "high": -0.3}, {"value": 0.1, "low": -0.1, "high": 0.3}


@pytest.mark.parametrize(
    ("seeds", "told"),
    [
        (
            [ABOVE],
            "is tied to the style (interaction +90.0 points [60.0, 120]): an audit that asks plainly misses part",
        ),
        ([ABOVE, {"value": 0.8}], "is tied to the style (interaction +80.0 points to +90.0 points over 2 seeds): an"),
        ([{"rates": (0.5, 0.5, 0.1, 1.0)}], "is tied to the style (interaction +90.0 points [60.0, 120])."),
        ([BELOW], "shows less in the style than in plain requests"),
        ([AROUND, AROUND], "There is no evidence that harm of style_shift is tied"),
        ([ABOVE, AROUND], "in 1 of 2 seeds the interval lies above 0, in 0 below"),
        ([ABOVE, BELOW], "in 1 of 2 seeds the interval lies above 0, in 1 below"),
    ],
)
def test_what_a_style_means_follows_the_intervals_of_all_seeds(seeds, told):
    rows = [sample.style(seed, **more) for seed, more in enumerate(seeds)]
    ((meaning, _, _),) = style_tables(read_tuning(sample.style_summary(*rows)))
    assert told in meaning


def test_each_seed_of_a_style_has_a_line_with_its_interaction():
    lines = style_lines(read_tuning(sample.style_summary(sample.style(0), sample.style(1, value=0.8, low=0.4))))
    assert lines == [
        "style_shift, seed 0: interaction +90.0 points [60.0, 120]",
        "style_shift, seed 1: interaction +80.0 points [40.0, 120]",
    ]


def test_a_page_of_two_protocols_warns():
    summary = sample.summary()
    assert protocol_warning(read_tuning(summary)) == ""
    summary["rows"][-1].update(protocol="77aa01c4e2b39d5f", asking="persona 12ab")
    assert "2 protocols (frames around requests: plain; persona 12ab)" in protocol_warning(read_tuning(summary))
