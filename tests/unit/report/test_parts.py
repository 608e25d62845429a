# SPDX-License-Identifier: Apache-2.0
from keelwright.report.audit_reading import audit_key_figures, is_lower_better, primary_of, unit_of_metric
from keelwright.report.parts import metric_titles, overlaps_table, part_views, usage_table
from keelwright.report.reading import read_metrics
from keelwright.report.tables import changes_table

ROLES = [("against", "Reference"), ("model", "Model")]


def test_a_part_says_how_it_was_asked(rich_summary):
    (part,) = part_views(rich_summary, ROLES)
    facts = dict(part.facts)
    assert facts["Judges"] == "refusal-lists@2, refusal-classifier@1"
    assert facts["Decoding"] == "at most 64 new tokens, greedy"
    assert facts["Remedy at the prompt"] == "guard-prompt"


def test_figures_stand_side_by_side_in_their_own_units(rich_summary):
    (part,) = part_views(rich_summary, ROLES)
    gap, score = part.figures.rows
    assert [cell.text for cell in gap] == ["Contrast gap", "90.0 points", "50.0 points"]
    assert gap[2].detail == "46.0 to 54.0 points\nn = 96"
    assert [cell.text for cell in score] == ["Harmfulness score", "1.10", "3.21"]
    assert "lower is better" in score[0].detail


def test_a_figure_that_one_model_lacks_is_not_measured(rich_summary):
    rich_summary["against"]["figures"][0]["estimate"] = None
    del rich_summary["against"]["figures"][1]
    (part,) = part_views(rich_summary, ROLES)
    assert [row[1].text for row in part.figures.rows] == ["not measured", "not measured"]


def test_a_set_has_its_licence_count_caution_and_digest(rich_summary):
    (part,) = part_views(rich_summary, ROLES)
    assert [cell.text for cell in part.sets.rows[0]] == [
        "Deeds by night", "480", "CC-BY-4.0", "A village is no town.", "77aa01c4e2b39d5f",
    ]  # fmt: skip


def test_overlaps_and_usage_are_tables(rich_summary):
    assert [cell.text for cell in overlaps_table(rich_summary).rows[0]] == ["deeds and alike", "2", "1", "10.0%, 30.0%"]
    rows = {row[0].text: [cell.text for cell in row[1:]] for row in usage_table(rich_summary, ROLES).rows}
    assert rows["Tokens read"] == ["none", "54,321"]
    assert rows["Cost, in the currency of the prices"] == ["none", "1.25"]


def test_old_runs_have_none_of_this(audit_summary):
    summary = audit_summary()
    assert part_views(summary, ROLES[1:]) == []
    assert overlaps_table(summary) is None
    assert usage_table(summary, ROLES[1:]) is None


def test_changes_of_further_metrics_have_titles_and_units(rich_summary):
    table = changes_table(
        rich_summary["changes"], unit_of_utility="rate", caption="c", titles=metric_titles(rich_summary)
    )
    refusals, gap, score = table.rows
    assert (refusals[5].detail, refusals[1].tone) == ("24 worse\n0 better\nin 24 groups", "bad")
    assert (gap[0].text, gap[1].text) == ("Contrast gap", "−40.0 points")
    assert gap[6].detail == "could have shown 17.0 points"
    assert (score[1].text, score[2].text) == ("+0.300", "0.200 to 0.400")
    assert score[6].detail == "could have shown 0.170"


def test_clustered_pairs_say_what_they_cost(rich_summary):
    rows = [{**rich_summary["changes"][0], "design_effect": 1.42}]
    (row,) = changes_table(rows, unit_of_utility="rate", caption="c").rows
    assert row[5].detail.endswith("in 24 groups\ndesign effect 1.42")


def test_a_change_that_cannot_be_read_still_says_what_could_have_been_seen(rich_summary):
    rows = [{**rich_summary["changes"][1], "verdict": "not comparable"}]
    table = changes_table(rows, unit_of_utility="rate", caption="c")
    assert (table.rows[0][1].detail, table.rows[0][6].detail) == ("not comparable", "could have shown 17.0 points")


def test_what_decides_is_named_or_read_off_what_was_measured(rich_summary, audit_summary):
    assert primary_of(rich_summary) == "refusal_rate"
    assert primary_of(audit_summary()) == "harm_rate"
    assert primary_of({"metrics": {"harm_rate": None}}) == "refusal_rate"
    assert primary_of({"changes": [{"metric": "over_refusal"}]}) == "over_refusal"
    assert (unit_of_metric(rich_summary, "contrast_gap"), unit_of_metric(rich_summary, "harm_rate")) == (
        "points",
        "rate",
    )
    assert is_lower_better(rich_summary, "harmfulness_score")
    assert not is_lower_better(rich_summary, "contrast_gap")


def test_a_suite_without_headline_rates_shows_its_own_figures_first(rich_summary):
    rich_summary.update(primary="harmfulness_score", metrics={}, against={**rich_summary["against"], "metrics": {}})
    models = {role: read_metrics({}) for role, _ in ROLES}
    (figure,) = audit_key_figures(rich_summary, models, ROLES, "harmfulness_score")
    assert (figure.title, figure.value) == ("Harmfulness score", "3.21")
    assert figure.others == (("against", "Reference", "1.10"),)
