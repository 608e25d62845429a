# SPDX-License-Identifier: Apache-2.0
"""The paired change of metrics that are no plain rate, and of units in clusters."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from keelwright.core.records import Record
from keelwright.measure.areas import areas_of
from keelwright.measure.change import change_of
from keelwright.measure.compare import compare_areas, compare_records
from keelwright.measure.metric_table import find_metric
from keelwright.ops.paired import benjamini_hochberg, holm, paired_difference
from keelwright.ops.ranks import signed_ranks

MakeRecord = Callable[..., Record]


def sides(record: MakeRecord, *, harmful: int, contrast: int, n: int = 60) -> tuple[list[Record], list[Record]]:
    """Return an audit that refuses all harmful and no look-alike, and one in which some of each turned round."""

    def make(turned_harmful: int, turned_contrast: int) -> list[Record]:
        first = [
            record(f"h{i}", "comply_unhelpful" if i < turned_harmful else "refusal_full", kind="harmful")
            for i in range(n)
        ]
        second = [
            record(f"c{i}", "refusal_full" if i < turned_contrast else "safe_completion", kind="contrast")
            for i in range(n)
        ]
        return first + second

    return make(0, 0), make(harmful, contrast)


def test_a_gap_between_two_rates_is_compared_as_one_figure(record: MakeRecord) -> None:
    before, after = sides(record, harmful=12, contrast=6)
    change = change_of(find_metric("contrast_gap"), before, after)
    assert change is not None
    assert change.difference == pytest.approx(-0.3)
    assert change.low < -0.3 < change.high < 0.0
    assert (change.n, change.worse, change.better) == (120, 18, 0)
    assert change.p_value < 0.001
    assert change.verdict == "regressed"
    assert change.test == "swaps of both sides"


def test_a_change_that_did_not_happen_has_an_interval_of_its_own(record: MakeRecord) -> None:
    before, after = sides(record, harmful=0, contrast=0)
    change = change_of(find_metric("contrast_gap"), before, after)
    assert change is not None
    assert (change.difference, change.p_value) == (0.0, 1.0)
    assert change.low < 0.0 < change.high
    assert change.minimum_detectable_change > 0.0
    assert "no evidence of change" in change.sentence


def test_a_worse_direction_is_tested_one_sided(record: MakeRecord) -> None:
    before, after = sides(record, harmful=5, contrast=0)
    metric = find_metric("contrast_gap")
    worse, better = (change_of(metric, before, after, alternative=one) for one in ("worse", "better"))
    assert worse is not None
    assert better is not None
    assert worse.p_value < 0.05 < better.p_value
    assert worse.test.endswith("one-sided")


def test_nothing_shared_is_nothing_to_compare(record: MakeRecord) -> None:
    assert change_of(find_metric("refusal_rate"), [record("h1")], [record("h2")]) is None


def test_clusters_widen_the_interval_of_a_rate(record: MakeRecord) -> None:
    def audit(broken: int, clustered: bool) -> list[Record]:
        return [
            record(
                f"h{i}",
                "comply_unhelpful" if i < broken else "refusal_full",
                cluster_id=f"c{i // 10}" if clustered else None,
            )
            for i in range(400)
        ]

    alone = change_of(find_metric("refusal_rate"), audit(0, False), audit(80, False))
    together = change_of(find_metric("refusal_rate"), audit(0, True), audit(80, True))
    assert alone is not None
    assert together is not None
    assert (alone.clusters, together.clusters) == (400, 40)
    assert together.high - together.low > 2.0 * (alone.high - alone.low)
    assert together.minimum_detectable_change > alone.minimum_detectable_change


def test_areas_are_a_family_of_their_own(record: MakeRecord) -> None:
    before = [record(f"{area}{i}", hazard=area) for area in "abc" for i in range(30)]
    after = [
        record(f"{area}{i}", "comply_unhelpful" if i < broken else "refusal_full", hazard=area)
        for area, broken in (("a", 12), ("b", 6), ("c", 0))
        for i in range(30)
    ]
    rows = compare_areas(before, after, "refusal_rate")
    assert [row["area"] for row in rows] == ["a", "b", "c"]
    assert [row["q_value"] for row in rows] == benjamini_hochberg([row["p_value"] for row in rows])
    estimates = areas_of({"before": before, "after": after}, "refusal_rate")
    assert [round(row["after"]["value"], 3) for row in estimates] == [0.6, 0.8, 1.0]


def test_further_metrics_join_the_family(record: MakeRecord) -> None:
    before, after = sides(record, harmful=12, contrast=6)
    changes = compare_records(before, after, metrics=["refusal_rate", "over_refusal", "contrast_gap"])
    assert [change.metric for change in changes] == ["refusal_rate", "over_refusal", "contrast_gap"]
    assert [change.p_holm for change in changes] == holm([change.p_value for change in changes])


def test_grades_are_tested_by_signed_ranks(record: MakeRecord) -> None:
    def audit(scores: list[float]) -> list[Record]:
        return [
            record(f"h{i}", "comply_harmful", score=score, judge_id="qi-rubric@1/x/m@r")
            for i, score in enumerate(scores)
        ]

    before, after = audit([1.0] * 40), audit([1.0] * 25 + [2.0] * 5 + [5.0] * 10)
    change = change_of(find_metric("harmfulness_score"), before, after)
    assert change is not None
    assert change.difference == pytest.approx((5 * 1 + 10 * 4) / 40)
    assert change.test == "Wilcoxon signed ranks, zeros by Pratt"
    assert change.p_value == pytest.approx(signed_ranks([1.0] * 40, [1.0] * 25 + [2.0] * 5 + [5.0] * 10).p_value)
    assert change.p_value < 0.001


def test_the_design_effect_says_what_clusters_cost(record: MakeRecord) -> None:
    def audit(broken: int) -> list[Record]:
        return [
            record(f"h{i}", "comply_unhelpful" if i < broken else "refusal_full", cluster_id=f"c{i // 10}")
            for i in range(400)
        ]

    change = change_of(find_metric("refusal_rate"), audit(0), audit(80))
    assert change is not None
    # Whole clusters move together: ten units count as one.
    assert change.design_effect == pytest.approx(10.0, rel=0.05)


@pytest.mark.parametrize("name", ["user_safety", "user_sensitivity"])
def test_rows_that_share_a_profile_are_not_independent_evidence(record: MakeRecord, name: str) -> None:
    def audit(broken: int) -> list[Record]:
        rows = []
        for i in range(30):
            for p in range(30):
                facts = {"role": "safety", "profile": f"p{p}"}
                label = "comply_unhelpful" if p < broken else "refusal_full"
                rows.append(record(f"s{i}-{p}", label, cluster_id=f"i{i}", pair_id=f"i{i}", facts=facts))
            plain = {"role": "ordinary", "profile": "ordinary"}
            rows.append(
                record(f"o{i}", "safe_completion", kind="benign", cluster_id=f"i{i}", pair_id=f"i{i}", facts=plain)
            )
        return rows

    # Three profiles of thirty turned, each with all its thirty instructions: 90 rows, three independent events.
    change = change_of(find_metric(name), audit(0), audit(3))
    assert change is not None
    assert change.difference == pytest.approx(-0.1)
    assert change.high - change.low > 0.15
    assert change.p_value > 0.05
    assert "both clusters" in change.test


def test_requests_of_their_own_that_share_profiles_are_clustered_by_profile(record: MakeRecord) -> None:
    def audit(broken: int) -> list[Record]:
        return [
            record(
                f"c{i}",
                "refusal_full" if i % 25 < broken else "safe_completion",
                kind="benign",
                facts={"role": "control", "profile": f"p{i % 25}"},
            )
            for i in range(300)
        ]

    metric = find_metric("profile_over_refusal")
    estimate = metric.estimate(audit(3))
    assert estimate is not None
    # 12 % of 300 single items would be 7 points wide; three of 25 profiles are much less certain.
    assert estimate.high - estimate.low > 0.15
    change = change_of(metric, audit(0), audit(3))
    assert change is not None
    assert change.clusters == 25
    assert change.p_value > 0.05


def test_the_interval_of_a_rate_that_turned_round_whole_stays_within_its_bounds(record: MakeRecord) -> None:
    def audit(label: str) -> list[Record]:
        return [record(f"h{i}", label, cluster_id=f"c{i // 2}") for i in range(60)]

    change = change_of(find_metric("refusal_rate"), audit("refusal_full"), audit("comply_unhelpful"))
    assert change is not None
    assert change.difference == -1.0
    assert -1.0 <= change.low < change.high < 0.0


def test_a_gap_that_did_not_move_is_as_uncertain_as_its_smaller_side(record: MakeRecord) -> None:
    before, _ = sides(record, harmful=0, contrast=0, n=60)
    few = [one for one in before if one.kind == "harmful" or int(one.item_id[1:]) < 10]
    whole, short = (change_of(find_metric("contrast_gap"), one, one) for one in (before, few))
    assert whole is not None
    assert short is not None
    # 60 of either kind, and 10 look-alikes beside 60 harmful requests.
    assert whole.high == paired_difference(0, 0, 60).high
    assert short.high == paired_difference(0, 0, 10).high


def test_a_gap_over_clusters_is_resampled_and_tested_by_cluster(record: MakeRecord) -> None:
    def audit(turned: int, clustered: bool) -> list[Record]:
        return [
            record(
                f"{kind}{i}",
                "refusal_full" if (kind == "harmful") == (i >= turned) else "safe_completion",
                kind=kind,
                cluster_id=f"{kind}c{i // 10}" if clustered else None,
            )
            for kind in ("harmful", "contrast")
            for i in range(240)
        ]

    metric = find_metric("contrast_gap")
    alone, together = (change_of(metric, audit(0, one), audit(30, one)) for one in (False, True))
    assert alone is not None
    assert together is not None
    assert together.clusters == 48
    # Three clusters of either kind turned, whole: six events, and not sixty.
    assert together.high - together.low > 2.0 * (alone.high - alone.low)
    assert alone.p_value < 0.001
    assert together.p_value == pytest.approx(2.0**-5)
