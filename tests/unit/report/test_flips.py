# SPDX-License-Identifier: Apache-2.0
import dataclasses

import pytest

from keelwright.core.records import Judgement
from keelwright.measure.metrics import RULES, flags
from keelwright.report.flips import flips_of
from keelwright.report.verdicts import answered_by_model


def turned(record, kind, before, after, scores=(None, None)):
    first, second = (
        {"x": dataclasses.replace(record, item_id="x", kind=kind, judgements={"j@1": Judgement(label, score)})}
        for label, score in zip((before, after), scores, strict=True)
    )
    return [(one.key, one.item_ids) for one in flips_of(first, second, knows_harm=True)]


@pytest.mark.parametrize(
    ("kind", "before", "after", "scores", "keys"),
    [
        ("harmful", "refusal_full", "comply_harmful", (1.0, 5.0), ["harm_rate:worse", "refusal_rate:worse"]),
        ("harmful", "comply_harmful", "refusal_partial", (5.0, 1.0), ["harm_rate:better", "refusal_rate:better"]),
        ("harmful", "refusal_full", "refusal_partial", (1.0, 1.0), []),
        ("contrast", "safe_completion", "refusal_full", (None, None), ["over_refusal:worse"]),
        ("benign", "safe_completion", "incoherent", (None, None), ["answer_rate:worse", "incoherent:worse"]),
        ("task", "wrong", "correct", (0.0, 1.0), ["utility:better"]),
        ("harmful", "refusal_full", "unparsed", (None, None), []),
        ("harmful", "error", "comply_harmful", (None, 5.0), []),
    ],
)
def test_an_item_turns_on_the_metrics_that_count_it(records, kind, before, after, scores, keys):
    assert [key for key, _ in turned(records[0], kind, before, after, scores)] == keys


def test_turns_are_those_of_the_metrics(records):
    """The same items turn as in the paired tests, which count them in another room."""
    by_model = answered_by_model(records)
    found = {one.key: set(one.item_ids) for one in flips_of(by_model["aligned"], by_model["tuned"], knows_harm=True)}
    for metric, rule in RULES.items():
        before, after = (
            flags([one for one in records if one.model_id == name], metric) for name in ("aligned", "tuned")
        )
        up = {item for item in before if not before[item] and after[item]}
        down = {item for item in before if before[item] and not after[item]}
        better, worse = (up, down) if rule.higher_is_better else (down, up)
        assert found.get(f"{metric}:worse", set()) == worse
        assert found.get(f"{metric}:better", set()) == better


def test_harm_comes_first_and_turns_for_the_better_last(records):
    by_model = answered_by_model(records)
    keys = [one.key for one in flips_of(by_model["aligned"], by_model["tuned"], knows_harm=True)]
    assert keys[0] == "harm_rate:worse"
    assert keys == sorted(keys, key=lambda key: key.endswith("better"))


def test_without_a_judge_of_harm_a_score_is_no_harm(records):
    by_model = answered_by_model(records)
    keys = [one.key for one in flips_of(by_model["aligned"], by_model["tuned"], knows_harm=False)]
    assert not any(key.startswith("harm_rate") for key in keys)
    assert keys[0] == "refusal_rate:worse"
