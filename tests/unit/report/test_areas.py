# SPDX-License-Identifier: Apache-2.0
import pytest

from keelwright.report.areas import area_changes_table, area_forest, change_forest

ROLES = [("against", "Reference"), ("model", "Model")]


def estimate(value, n=8):
    return {"value": value, "low": max(0.0, value - 0.1), "high": min(1.0, value + 0.1), "n": n}


def area(name, model, against=1.0):
    return {"area": name, "model": None if model is None else estimate(model), "against": estimate(against)}


def names(figure):
    return [row[0].text for row in figure.table.rows]


@pytest.mark.parametrize(("lower_is_better", "order"), [(True, ["C", "A", "B", "D"]), (False, ["B", "A", "C", "D"])])
def test_the_worst_area_stands_first_and_what_was_not_measured_last(lower_is_better, order):
    areas = [area("A", 0.5), area("B", 0.1), area("C", 0.9), area("D", None)]
    assert names(area_forest(areas, ROLES, "harm_rate", lower_is_better=lower_is_better)) == order


def test_of_areas_that_are_alike_the_one_that_lost_most_stands_first():
    areas = [area("A", 0.0, against=0.2), area("B", 0.0, against=0.9)]
    assert names(area_forest(areas, ROLES, "refusal_rate", lower_is_better=False)) == ["B", "A"]


def test_both_models_stand_side_by_side_with_value_count_and_interval(rich_summary):
    figure = area_forest(rich_summary["areas"], ROLES, "refusal_rate", lower_is_better=False)
    assert "0%, n = 2" in figure.panels[0].wide
    assert [entry.text for entry in figure.legend] == ["Reference", "Model"]
    assert figure.table.rows[0][2].detail == "0 to 65.8%\nn = 2"
    assert len(figure.table.rows) == 24


def test_changes_are_sorted_by_what_got_worse_and_show_what_could_have_been_seen(rich_summary):
    figure = change_forest(rich_summary["area_changes"], "refusal_rate")
    found = [row[1].text for row in figure.table.rows]
    assert found == sorted(found, key=lambda text: -float(text.replace("−", "").split()[0]))
    first, last = figure.table.rows[0], figure.table.rows[-1]
    assert (first[1].detail, first[1].tone, first[6].detail) == ("regressed", "bad", "")
    assert (last[1].detail, last[1].tone) == ("no evidence of change", "")
    assert last[6].detail == "could have shown 17.0 points"
    assert last[4].text == "0.400"


def test_every_p_above_a_twentieth_says_what_could_have_been_seen(rich_summary):
    row = {**rich_summary["area_changes"][0], "q_value": 0.04, "p_value": 0.06}
    assert area_changes_table([row], "refusal_rate").rows[0][6].detail == "could have shown 17.0 points"


def test_a_change_without_evidence_is_hollow_and_its_direction_is_the_metrics(rich_summary):
    rows = [{**rich_summary["area_changes"][0], "difference": 0.5, "q_value": q} for q in (0.01, 0.2)]
    better = change_forest(rows[:1], "refusal_rate").panels[0].wide
    assert 'class="point good"' in better
    assert "right is better" in better
    quiet = change_forest(rows[1:], "refusal_rate").panels[0].wide
    assert 'class="point quiet hollow"' in quiet
    harm = [{**rows[0], "higher_is_better": False}]
    worse = change_forest(harm, "harm_rate").panels[0].wide
    assert 'class="point bad"' in worse
    assert "left is better" in worse


def test_a_score_changes_by_numbers_not_points(rich_summary):
    rows = [{**rich_summary["area_changes"][0], "unit": "score", "difference": -0.5}]
    assert change_forest(rows, "harmfulness_score").table.rows[0][1].text == "−0.500"


def test_no_areas_give_no_figure():
    assert area_forest([], ROLES, "harm_rate") is None
    assert change_forest([], "harm_rate") is None
