# SPDX-License-Identifier: Apache-2.0
"""A judge against people: known answers of XSTest, corrected rates, bias between conditions, warnings."""

import os
from pathlib import Path

import pytest

from keelwright.core.errors import ConfigError, DataError
from keelwright.judges.xstest_prefixes import PrefixJudge
from keelwright.measure.labels import Rated, rate_by_column, read_labels
from keelwright.measure.validate import validate, validate_judge
from keelwright.ops.agreement import Confusion

FOLDER = Path(os.environ.get("KEELWRIGHT_DATA", "")) / "xstest"
FILES = {model: FOLDER / f"completions_mistral{model}_labelled.csv" for model in ("instruct", "guard")}

needs_xstest = pytest.mark.skipif(
    "KEELWRIGHT_DATA" not in os.environ or not all(path.is_file() for path in FILES.values()),
    reason="needs the XSTest completions in KEELWRIGHT_DATA/xstest",
)


def rated(tp, fn, fp, tn, *, condition="before"):
    cells = [("refusal_full", "refusal_full", tp), ("refusal_full", "compliance", fn)]
    cells += [("compliance", "refusal_full", fp), ("compliance", "compliance", tn)]
    return [
        Rated(f"{condition}-{row}-{number}", condition, truth, said)
        for row, (truth, said, count) in enumerate(cells)
        for number in range(count)
    ]


def figures(agreement):
    return tuple(
        round(one.value, 2)
        for one in (agreement.sensitivity, agreement.specificity, agreement.kappa)
        if one is not None
    )


# Known answers: method sheet 20b, section 4 (computed from the files of paul-rottger/exaggerated-safety at d7bb5bd).


@needs_xstest
@pytest.mark.parametrize(
    ("model", "counts", "expected"),
    [
        ("instruct", Confusion(16, 60, 3, 371), (0.21, 0.99, 0.29)),
        ("guard", Confusion(163, 77, 9, 201), (0.68, 0.96, 0.62)),
    ],
)
def test_string_match_agrees_with_people_as_published(model, counts, expected):
    labelled = read_labels(FILES[model])
    for found in (
        validate_judge(labelled, PrefixJudge()),
        validate(rate_by_column(labelled, "strmatch_label", "refusal"), "refusal", judge_id="strmatch"),
    ):
        (agreement,) = found.agreements
        assert agreement.counts == counts
        assert figures(agreement) == expected
        assert agreement.excluded == 0
        assert found.warnings == ()


@needs_xstest
@pytest.mark.parametrize(("model", "expected"), [("instruct", (0.21, 0.90, 0.12)), ("guard", (0.66, 0.99, 0.64))])
def test_gpt4_agrees_with_people_as_published(model, expected):
    rows = rate_by_column(read_labels(FILES[model]), "gpt4_label", "refusal")
    found = validate(rows, "refusal", judge_id="gpt4", unparsed="count")
    assert figures(found.agreements[0]) == expected
    if model == "instruct":
        assert round(found.agreements[0].kappa_classes.value, 2) == 0.06
        assert validate(rows, "refusal", judge_id="gpt4").agreements[0].excluded == 11


@needs_xstest
@pytest.mark.parametrize(("model", "kappa"), [("instruct", 0.92), ("guard", 0.89)])
def test_people_agree_with_each_other_as_published(model, kappa):
    rows = rate_by_column(read_labels(FILES[model]), "annotation_2", "refusal", truth="annotation_1")
    (agreement,) = validate(rows, "refusal", judge_id="people").agreements
    assert round(agreement.kappa_classes.value, 2) == kappa
    assert agreement.kappa_classes.low < agreement.kappa_classes.value < agreement.kappa_classes.high


@needs_xstest
def test_the_prefix_list_is_biased_between_the_two_models():
    labelled = [one for path in FILES.values() for one in read_labels(path)]
    found = validate_judge(labelled, PrefixJudge())
    assert found.is_biased
    ((shift),) = found.shifts.values()
    assert shift.sensitivity_p < 1e-10
    assert any(
        line.startswith("Paired comparison is biased between 'completions_mistralinstruct") for line in found.warnings
    )


def test_a_rate_is_corrected_for_the_judges_errors():
    """Rogan-Gladen 0.30 with sensitivity .9 and specificity .95 gives 0.2941 (method sheet 20b, section 9)."""
    audit = [True] * 300 + [False] * 700
    found = validate(rated(90, 10, 5, 95), "refusal", judge_id="j", audits={"before": audit})
    corrected = found.agreements[0].corrected
    assert round(corrected.value, 4) == 0.2941
    assert corrected.low < 0.2941 < corrected.high
    # Both samples' errors: wider than the audit alone would be.
    assert corrected.high - corrected.low > 2 * 1.96 * (0.3 * 0.7 / 1000) ** 0.5


def test_a_judge_that_guesses_is_not_corrected_for():
    found = validate(rated(55, 45, 46, 54), "refusal", judge_id="j", audits={"before": [True, False] * 50})
    (agreement,) = found.agreements
    assert agreement.corrected is None
    assert agreement.not_corrected == "This judge is too close to guessing for its rates to be corrected."
    assert any("the rate is not corrected" in line for line in found.warnings)


def test_labels_of_one_class_cannot_correct_a_rate():
    found = validate(rated(0, 0, 5, 95), "refusal", judge_id="j", audits={"before": [True, False] * 50})
    (agreement,) = found.agreements
    assert agreement.sensitivity is None
    assert "lack one class" in agreement.not_corrected


def test_errors_that_differ_between_conditions_bias_a_paired_comparison():
    same = validate(rated(80, 20, 5, 95) + rated(78, 22, 6, 94, condition="after"), "refusal", judge_id="j")
    assert not same.is_biased
    worse = validate(rated(80, 20, 5, 95) + rated(40, 60, 5, 95, condition="after"), "refusal", judge_id="j")
    assert worse.is_biased
    assert list(worse.shifts) == [("before", "after")]
    assert any(line.startswith("Paired comparison is biased between 'before' and 'after'") for line in worse.warnings)


def test_the_level_is_shared_by_all_pairs_of_conditions():
    rows = [one for name in ("a", "b", "c") for one in rated(80, 20, 5, 95, condition=name)]
    found = validate(rows, "refusal", judge_id="j", alpha=0.06)
    assert [shift.alpha for shift in found.shifts.values()] == pytest.approx([0.02] * 3)


def test_few_labels_are_warned_of():
    found = validate(rated(40, 10, 5, 45), "refusal", judge_id="j")
    assert found.warnings == ("100 labels: fewer than 200, too few to rest a claim on this judge.",)
    one_sided = validate(rated(5, 1, 5, 195), "refusal", judge_id="j")
    assert one_sided.warnings == ("'before' has 6 positive labels, fewer than 20.",)


def test_verdicts_that_could_not_be_read_are_left_out_and_counted():
    rows = [*rated(100, 0, 0, 100), *(Rated(f"u{number}", "before", "compliance", None) for number in range(7))]
    found = validate(rows, "refusal", judge_id="j")
    (agreement,) = found.agreements
    assert (agreement.n, agreement.excluded) == (200, 7)
    assert found.warnings == ("'before': 7 of 207 verdicts could not be read.",)
    counted = validate(rows, "refusal", judge_id="j", unparsed="count").agreements[0]
    assert (counted.n, counted.excluded, counted.counts.tn) == (207, 0, 107)
    assert counted.kappa_classes.value < 1.0


def test_five_levels_have_a_weighted_kappa_and_a_reliability_table():
    rows = [
        Rated(f"{truth}{said}{number}", "before", str(truth), str(said), float(said))
        for truth in range(1, 6)
        for said in (truth, max(1, truth - 1))
        for number in range(30)
    ]
    found = validate(rows, "score", judge_id="j")
    (agreement,) = found.agreements
    # By hand: mean squared difference 0.4; of independent draws, variances 2 and 1.84 and squared bias 0.16, so 4.
    assert agreement.kappa_weighted.value == pytest.approx(1 - 0.4 / 4.0)
    assert agreement.kappa_classes.value < agreement.kappa_weighted.value
    assert [one.mean_score for one in found.reliability] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert found.reliability[-1].share.value == 1.0
    assert found.to_mapping()["calibration_error"] > 0.0


def test_scores_between_0_and_1_are_held_against_harm():
    rows = [
        Rated(f"r{number}", "before", "harmful" if number % 2 else "harmless", "harmful", 0.5) for number in range(200)
    ]
    found = validate(rows, "harm", judge_id="j")
    assert [(one.mean_score, one.share.value) for one in found.reliability] == [(0.5, 0.5)]


def test_a_perfect_judge_of_one_class_has_no_kappa():
    found = validate(rated(0, 0, 0, 200), "refusal", judge_id="j")
    assert found.agreements[0].kappa is None


def test_everything_is_told_as_plain_values():
    found = validate(rated(80, 20, 5, 95), "refusal", judge_id="j", audits={"before": [True, False] * 50}).to_mapping()
    (condition,) = found["conditions"]
    assert condition["counts"] == {"tp": 80, "fn": 20, "fp": 5, "tn": 95}
    assert condition["sensitivity"]["value"] == 0.8
    assert condition["corrected"]["n"] == 100
    assert condition["not_corrected"] is None
    assert found["is_biased"] is False


def test_nothing_to_compare_is_an_error():
    with pytest.raises(DataError, match="cannot be validated without labels"):
        validate([], "refusal", judge_id="j")
    with pytest.raises(DataError, match="No verdict on 'before' could be read"):
        validate([Rated("a", "before", "compliance", None)], "refusal", judge_id="j")
    with pytest.raises(ConfigError, match="condition of the audit"):
        validate(rated(1, 1, 1, 1), "refusal", judge_id="j", audits={"befor": [True, False]})
