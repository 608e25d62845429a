# SPDX-License-Identifier: Apache-2.0
import re

import pytest

from keelwright.core.records import Estimate
from keelwright.report.validation import draw_reliability, validation_views


def test_agreement_with_people_is_told_by_condition(rich_summary):
    (view,) = validation_views(rich_summary)
    before, after = view.agreement.rows
    assert [cell.text for cell in before] == ["before", "100", "0.620", "75.0%", "93.3%", "30, 10, 4, 56", "30.0%"]
    assert before[1].detail == "3 not readable"
    assert before[3].detail == "59.8 to 85.8%\nn = 40"
    assert (after[6].text, after[6].detail) == ("not measured", "The labels lack one class.")


def test_without_an_audit_to_correct_there_is_no_such_column(rich_summary):
    for one in rich_summary["validation"][0]["conditions"]:
        one.update(corrected=None, not_corrected=None)
    (view,) = validation_views(rich_summary)
    assert "corrected" not in view.agreement.columns[-1].title.lower()
    assert all(len(row) == len(view.agreement.columns) for row in view.agreement.rows)


def test_a_judge_that_errs_differently_is_called_biased(rich_summary):
    (view,) = validation_views(rich_summary)
    assert view.is_biased
    assert [cell.text for cell in view.shifts.rows[0]] == ["before and after", "0.0190", "1.00", "biased"]
    rich_summary["validation"][0]["shifts"][0]["biased"] = False
    (view,) = validation_views(rich_summary)
    assert view.shifts.rows[0][3].text == "no evidence of bias"


def test_scores_have_a_diagram_and_its_values(rich_summary):
    (view,) = validation_views(rich_summary)
    assert "Expected calibration error of its scores: 0.0810." in view.says
    rows = [[cell.text for cell in row] for row in view.reliability.table.rows]
    assert rows[0] == ["0 to 0.200", "0.100", "0%", "yes"]
    assert len(rows) == 5


def test_labels_without_scores_and_old_runs_have_no_diagram(rich_summary, audit_summary):
    rich_summary["validation"] = {**rich_summary["validation"][0], "reliability": [], "shifts": []}
    (view,) = validation_views(rich_summary)
    assert (view.reliability, view.shifts) == (None, None)
    assert validation_views(audit_summary()) == []


@pytest.mark.parametrize("width", [460.0, 330.0])
def test_a_calibrated_bin_lies_on_the_diagonal(width):
    found = draw_reliability([(0.5, Estimate(0.5, 0.3, 0.7, 20))], name="r", width=width)
    x1, y1, x2, y2 = (float(one) for one in re.search(r'd="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', found).groups())
    x, y = (float(one) for one in re.search(r'<circle cx="([\d.]+)" cy="([\d.]+)"', found).groups())
    assert (x, y) == pytest.approx(((x1 + x2) / 2, (y1 + y2) / 2), abs=0.1)
    assert x1 < x2
    assert y2 < y1


def test_a_bin_off_the_diagonal_is_told_in_words(rich_summary):
    rich_summary["validation"][0]["reliability"][0]["mean_score"] = 0.19
    (view,) = validation_views(rich_summary)
    assert view.reliability.table.rows[0][3].text == "no"
    assert "in 4 the mean score lies within" in view.reliability.panels[0].wide
