# SPDX-License-Identifier: Apache-2.0
from keelwright.report.figures import safety_utility_curve
from keelwright.report.page import render_heal
from keelwright.report.reading import read_summary
from keelwright.report.tables import (
    areas_table,
    changes_table,
    flatten,
    floor_words,
    limits_table,
    models_table,
    pairs_table,
    points_table,
    race_table,
    split_changes,
    trials_table,
)

ROLES = [("aligned", "Aligned"), ("tuned", "Tuned"), ("repaired", "Repaired")]


def cells(table, row):
    return next([cell.text for cell in one] for one in table.rows if one[0].text == row)


def test_the_models_stand_side_by_side_with_interval_and_count(summary_for):
    summary = summary_for()
    table = models_table(read_summary(summary).models, ROLES, summary)
    assert [column.title for column in table.columns] == ["Metric", "Aligned", "Tuned", "Repaired"]
    assert cells(table, "Harm rate")[1:] == ["0%", "63.3%", "3.33%"]
    assert table.rows[0][1].detail == "0 to 6.02%\nn = 60"
    assert "lower is better" in table.rows[0][0].detail
    assert "Accuracy on the 300 tasks" in table.rows[-1][0].detail


def test_what_was_not_measured_says_so(summary_for):
    summary = summary_for()
    summary["models"]["tuned"]["utility"] = None
    table = models_table(read_summary(summary).models, ROLES, summary)
    assert cells(table, "Utility")[2] == "not measured"


def test_the_utility_of_a_text_is_a_ratio(summary_for):
    summary = summary_for()
    summary["utility"]["scorer"] = "perplexity"
    table = models_table(read_summary(summary).models, ROLES, summary)
    assert cells(table, "Utility")[1:] == ["0.453", "0.853", "0.827"]


def test_changes_carry_test_and_both_p_values(summary_for):
    table = changes_table(summary_for()["tests"], unit_of_utility="rate", caption="c")
    harm = table.rows[0]
    assert [cell.text for cell in harm] == [
        "Harm rate", "+63.3 points", "49.8 to 74.4", "< 0.001", "< 0.001", "60", "exact McNemar",
    ]  # fmt: skip
    assert harm[0].detail == "aligned to tuned"
    assert (harm[1].detail, harm[1].tone) == ("regressed", "bad")
    assert (table.rows[2][1].detail, table.rows[2][1].tone) == ("improved", "good")


def test_no_evidence_is_never_called_no_change(summary_for):
    row = changes_table(summary_for()["tests"], unit_of_utility="rate", caption="c").rows[1]
    assert (row[1].detail, row[1].tone) == ("no evidence of change", "")
    assert row[6].detail == "could have shown 12.1 points"


def test_the_primary_metric_and_findings_are_shown_and_the_rest_folded(summary_for):
    tests = summary_for()["tests"]
    tests.append({**tests[0], "difference": 0.0, "p_value": 1.0, "p_holm": 1.0})
    shown, folded = split_changes(tests, "harm_rate")
    assert [row["metric"] for row in shown] == ["harm_rate", "harm_rate", "harm_rate"]
    assert [row["metric"] for row in folded] == ["answer_rate", "over_refusal"]


def test_the_comparisons_own_verdict_wins(summary_for):
    rows = [{**summary_for()["tests"][0], "verdict": "not comparable"}]
    cell = changes_table(rows, unit_of_utility="rate", caption="c").rows[0][1]
    assert (cell.detail, cell.tone) == ("not comparable", "")


def test_every_trial_is_listed_with_its_reason(summary_for):
    summary = summary_for()
    table = trials_table(read_summary(summary))
    assert len(table.rows) == len(summary["trials"])
    named = {row[0].text: row for row in table.rows}
    assert named["linear 0.4"][0].detail == "chosen"
    assert named["linear 0.4"][-1].text == "yes"
    assert (named["resta 1"][-1].text, "over refusal" in named["resta 1"][-1].detail) == ("no", True)


def test_a_common_count_stands_in_the_heading_and_others_in_the_cells(summary_for):
    summary = summary_for()
    assert trials_table(read_summary(summary)).columns[1].note == "n = 60"
    summary["trials"][0]["metrics"]["harm_rate"]["n"] = 59
    table = trials_table(read_summary(summary))
    assert table.columns[1].note == ""
    assert table.rows[0][1].detail == "n = 59"


def test_limits_name_both_halves_and_what_failed(summary_for):
    table = limits_table(read_summary(summary_for("repair_not_verified")))
    assert [row[1].text for row in table.rows] == ["selection"] * 4 + ["verification"] * 4
    failed = [row for row in table.rows if row[-1].text == "failed"]
    assert [[cell.text for cell in row] for row in failed] == [
        ["Over-refusal", "verification", "at most 5.00%", "8.33%", "failed"]
    ]


def test_a_limit_that_is_no_metric_is_shown_in_its_own_words(summary_for):
    summary = summary_for()
    summary["limits"] = [{"name": "improvement_p", "limit": 0.05, "value": None, "held": False, "half": "verification"}]
    assert [cell.text for cell in limits_table(read_summary(summary)).rows[0]] == [
        "Improvement p", "verification", "0.0500", "not measured", "failed",
    ]  # fmt: skip


def test_the_curves_table_has_every_point(summary_for):
    reading = read_summary(summary_for())
    table = points_table(reading)
    assert len(table.rows) == len(reading.trials) + 3
    assert [column.title for column in table.columns] == ["Point", "Utility", "Harm rate", "On front"]


def test_areas_have_a_column_for_each_model(summary_for):
    table = areas_table(summary_for()["areas"], ROLES, "harm_rate")
    assert cells(table, "Curses") == ["Curses", "0%", "73.3%", "6.67%"]


def test_nested_settings_are_flattened():
    assert flatten([("a", {"b": {"c": 1}, "d": {}}), ("e", None)]) == [("a.b.c", "1"), ("a.d", "none"), ("e", "none")]
    assert pairs_table("t", "c", [("a", 1)], ("x", "y")).rows[0][1].text == "1"


def test_limits_in_force_are_one_sentence(summary_for):
    summary = summary_for()
    assert floor_words(read_summary(summary)).startswith("utility at least 0.95 of the tuned model’s; answer rate")
    del summary["floors"]
    assert floor_words(read_summary(summary)) == ""


def raced(summary):
    """The sample run as a race: RESTA was left behind after the first round, two methods did not take part."""
    parts = {"linear": {"part": "selection", "items": 120}, "resta": {"part": "quarter", "items": 30}}
    trials = [{**one, **parts[one["method"]]} for one in summary["trials"]]
    best = next(index for index, one in enumerate(trials) if one["method"] == "resta")

    def row(method, ended, round_=None, best=None, text=""):
        return {"method": method, "ended": ended, "round": round_, "items": 0, "best": best, "text": text}

    race = [
        row("linear", "chosen", "selection", summary["chosen"]),
        row("resta", "left_behind", "quarter", best),
        row("broken", "failed", text="The tensor <w> overflows."),
        row("one", "left_out", text="needs x"),
        row("two", "left_out", text="needs x"),
    ]
    front = [index for index in summary["pareto"] if trials[index]["part"] == "selection"]
    beaten = [None if index in front else front[0] for index in range(len(trials))]
    return {**summary, "trials": trials, "race": race, "pareto": front, "dominated_by": beaten}


def test_the_race_shows_every_method_and_joins_those_left_out_for_one_reason(summary_for):
    table = race_table(read_summary(raced(summary_for())))
    assert [(row[0].text, row[1].text) for row in table.rows] == [
        ("linear", "chosen"), ("resta", "left behind"), ("broken", "failed"), ("2 methods", "left out"),
    ]  # fmt: skip
    assert table.rows[3][1].detail == "one, two: needs x"
    assert table.rows[1][1].detail == "after the round on a quarter of the selection half"
    assert table.rows[0][2].text == "linear 0.4"
    assert all(len(row) == len(table.columns) for row in table.rows)


def test_methods_that_were_all_searched_to_the_end_need_no_race(summary_for):
    assert race_table(read_summary(summary_for())) is None
    summary = raced(summary_for())
    assert race_table(read_summary({**summary, "race": summary["race"][:1]})) is None


def test_a_trial_of_the_first_rounds_says_so_and_a_dominated_one_says_by_which(summary_for):
    table = trials_table(read_summary(raced(summary_for())))
    details = {row[0].text: row[0].detail for row in table.rows}
    assert details["resta 0.5"].startswith("first rounds only, 30 items")
    assert any("dominated by linear" in detail for name, detail in details.items() if name.startswith("linear"))


def test_the_figure_and_its_values_leave_out_trials_on_fewer_items(summary_for):
    reading = read_summary(raced(summary_for()))
    assert not any(row[0].text.startswith("resta") for row in points_table(reading).rows)
    drawn = safety_utility_curve(reading)
    assert [entry.text for entry in drawn.legend if entry.text in ("linear", "resta")] == ["linear"]
    assert "resta" not in drawn.panels[0].wide


def test_the_page_of_a_race_escapes_what_a_method_said(summary_for, run):
    page = render_heal(run, raced(summary_for()), [])
    assert "The tensor &lt;w&gt; overflows." in page
    assert "of the last round" in page
