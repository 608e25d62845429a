# SPDX-License-Identifier: Apache-2.0
"""Tables of measurements, of paired changes and of differences over seeds."""

import importlib.util
from pathlib import Path

from keelwright.report.tuning_reading import read_tuning
from keelwright.report.tuning_tables import change_tables, claims_table, protocol_warning, results_tables

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


def test_differences_over_seeds_are_shown_at_the_last_step_only():
    table = claims_table(read_tuning(sample.summary(seeds=3)))
    assert [row[0].text for row in table.rows] == ["Harm rate", "Utility"]
    assert table.rows[0][1].text == "\u221270.0 points"
    assert claims_table(read_tuning(sample.summary())) is None


def test_a_page_of_two_protocols_warns():
    summary = sample.summary()
    assert protocol_warning(read_tuning(summary)) == ""
    summary["rows"][-1].update(protocol="77aa01c4e2b39d5f", asking="persona 12ab")
    assert "2 protocols (frames around requests: plain; persona 12ab)" in protocol_warning(read_tuning(summary))
