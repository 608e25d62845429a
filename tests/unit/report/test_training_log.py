# SPDX-License-Identifier: Apache-2.0
"""What training recorded and cost: by arm and stage, each training once."""

import importlib.util
from pathlib import Path

from keelwright.report.step_curves import training_curve
from keelwright.report.training_log import cost_table, courses_of
from keelwright.report.tuning_reading import read_tuning

_SPEC = importlib.util.spec_from_file_location("tuning_sample", Path(__file__).with_name("tuning_sample.py"))
sample = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(sample)


def test_courses_of_every_arm_share_a_chart_and_shared_hardenings_appear_once():
    reading = read_tuning(sample.summary(seeds=3))
    titles = [(one.title, one.arm) for one in courses_of(reading)]
    assert titles[:3] == [("Loss, poison", "Undefended"), ("Loss, poison", "Booster"), ("Loss, hardening", "Booster")]
    assert ("Drop, hardening", "Booster") in titles
    assert len(titles) == len(set(titles))


def test_a_log_of_one_run_is_read_too():
    reading = read_tuning(sample.tune_summary())
    assert [one.title for one in courses_of(reading)] == ["Loss", "Grad norm"]
    assert training_curve(reading).legend == ()
    assert training_curve(read_tuning({"rows": []})) is None


def test_costs_are_means_over_seeds_per_arm_and_stage():
    summary = sample.summary(seeds=2)
    summary["cost"]["poison / booster / seed 1"]["poison"] = {"steps": 100, "seconds": 41.4}
    rows = {(row[0].text, row[0].detail): row for row in cost_table(read_tuning(summary)).rows}
    assert rows["Booster", "Poison, mean of 2 seeds"][2].text == "31.4 s"
    assert rows["Booster", "Poison, mean of 2 seeds"][3].text == "0.314 s"
    assert ("Undefended", "Poison, mean of 2 seeds") in rows
    assert cost_table(read_tuning({"rows": []})) is None


def test_costs_of_one_run_are_in_their_own_units():
    rows = {row[0].text: row[1].text for row in cost_table(read_tuning(sample.tune_summary())).rows}
    assert rows == {
        "Passes a step, plain tuning being 1": "3.00", "Time of a step": "0.214 s", "Steps": "100",
        "Most memory in use": "512 MiB",
    }  # fmt: skip
