# SPDX-License-Identifier: Apache-2.0
"""Judges against labels, as an audit keeps it."""

import pytest

from keelwright.core.errors import ConfigError, DataError, MissingError
from keelwright.core.protocols import Silent
from keelwright.core.records import Judgement, Record
from keelwright.heal.validation import label_inputs, require_labels, sentence_of, validate_audit, validate_judges
from keelwright.judges.refusal import RefusalJudge
from keelwright.measure.audit import AuditResult, Examined
from keelwright.measure.metrics import metrics_of
from keelwright.measure.part import Part
from keelwright.ops.agreement import Confusion, rogan_gladen_interval

REFUSAL, ANSWER = "I will not help with that.", "First walk to the market and ask for a lamp."


class Odd:
    """A judge that reads nothing but its own set."""

    judge_id = "odd@1"

    def judge(self, item, generation):
        raise DataError("not mine", expected="my own items", found=item.item_id, fix="use another judge")


def record(number, refused, model="model", kind="harmful"):
    judgement = Judgement("refusal_full" if refused else "comply_unhelpful")
    return Record(
        item_id=f"{kind}-{number}", suite="set", suite_digest="s0", kind=kind, hazard="area", prompt="A question?",
        model_id=model, revision="r0", template_digest="t0", decoding_digest="d0",
        output=REFUSAL if refused else ANSWER, n_tokens=3, finish="eos",
        judgements={RefusalJudge().judge_id: judgement},
    )  # fmt: skip


def result(after, before=None, primary="refusal_rate"):
    sides = [
        None if side is None else Examined("m", side, metrics_of(side, knows_harm=False)) for side in (after, before)
    ]
    return AuditResult(sides[0], sides[1], (), (), (), primary, {}, None, {})


def part(*judges):
    return Part("set", "", (), judges, tuple(one.judge_id for one in judges), None, ())


def write_labels(path, condition, *, agree, missed, false, right):
    """Labels of which the refusal judge finds some, misses some, and calls some answers refusals."""
    rows = [(REFUSAL, "full_refusal")] * agree + [(ANSWER, "full_refusal")] * missed
    rows += [(REFUSAL, "full_compliance")] * false + [(ANSWER, "full_compliance")] * right
    lines = [f"Question {number}?,{answer},{label},{condition}" for number, (answer, label) in enumerate(rows)]
    path.write_text("\n".join(["prompt,answer,label,condition", *lines]) + "\n")
    return str(path)


@pytest.mark.parametrize("condition", ["after", "model", "anything", "Before"])
def test_labels_of_a_single_condition_speak_of_the_audited_model(condition, tmp_path):
    after = [record(number, number < 60) for number in range(100)]
    before = [record(number, number < 90, "against") for number in range(100)]
    file = write_labels(tmp_path / "labels.csv", condition, agree=40, missed=10, false=5, right=45)
    (one,) = validate_audit(result(after, before), (part(RefusalJudge()),), (file,), seed=0, progress=Silent())
    expected = rogan_gladen_interval([True] * 60 + [False] * 40, Confusion(40, 10, 5, 45), seed=0)
    assert one["conditions"][0]["corrected"] == expected.to_mapping()
    assert one["metric"] == "refusal_rate"


def test_two_conditions_are_the_two_models(tmp_path):
    after = [record(number, number < 60) for number in range(100)]
    before = [record(number, number < 90, "against") for number in range(100)]
    files = tuple(
        write_labels(tmp_path / f"{name}.csv", name, agree=40, missed=10, false=5, right=45)
        for name in ("before", "after", "elsewhere")
    )
    (one,) = validate_audit(result(after, before), (part(RefusalJudge()),), files, seed=0, progress=Silent())
    observed = {"before": 90, "after": 60}
    for condition in one["conditions"]:
        refused = observed.get(condition["condition"])
        if refused is None:
            assert condition["corrected"] is None
        else:
            # Rogan and Gladen 1978: (observed + specificity - 1) / (sensitivity + specificity - 1).
            truth = min(1.0, (refused / 100 + 0.9 - 1.0) / (0.8 + 0.9 - 1.0))
            assert condition["corrected"]["value"] == pytest.approx(truth)


def test_over_refusal_is_corrected_on_look_alikes(tmp_path):
    after = [record(number, number < 30, kind="contrast") for number in range(100)]
    after += [record(number, True) for number in range(100)]
    file = write_labels(tmp_path / "labels.csv", "x", agree=50, missed=0, false=0, right=50)
    (one,) = validate_audit(
        result(after, primary="over_refusal"), (part(RefusalJudge()),), (file,), seed=0, progress=Silent()
    )
    assert one["metric"] == "over_refusal"
    assert one["conditions"][0]["corrected"]["value"] == pytest.approx(0.3)


def test_a_judge_that_cannot_read_the_labels_does_not_lose_the_audit(tmp_path):
    file = write_labels(tmp_path / "labels.csv", "x", agree=50, missed=0, false=0, right=50)
    odd, lists = validate_audit(
        result([record(0, True)]), (part(Odd(), RefusalJudge()),), (file,), seed=0, progress=Silent()
    )
    assert odd["conditions"] == []
    assert odd["warnings"] == ["Not held against the labels. not mine"]
    assert "kappa is not defined" in sentence_of(odd)
    assert sentence_of(lists) == "refusal-lists@1: kappa 1.00 on x."


def test_labels_may_name_answers_of_the_audit_by_item_and_model(tmp_path):
    after = [record(number, number % 2 == 0) for number in range(40)]
    lines = [f'{{"item_id": "harmful-{n}", "condition": "model", "label": "{"refusal" if n % 2 == 0 else "answer"}"}}'
             for n in range(40)]  # fmt: skip
    (tmp_path / "labels.jsonl").write_text("\n".join(lines))
    file = str(tmp_path / "labels.jsonl")
    require_labels((file,), has_records=True)
    (one,) = validate_audit(result(after), (part(RefusalJudge()),), (file,), seed=0, progress=Silent())
    assert one["conditions"][0]["counts"] == {"tp": 20, "fn": 0, "fp": 0, "tn": 20}
    with pytest.raises(ConfigError, match="names answers without holding them"):
        require_labels((file,), has_records=False)


def test_two_files_must_be_of_one_scale(tmp_path):
    refusals = write_labels(tmp_path / "refusals.csv", "x", agree=5, missed=0, false=0, right=5)
    (tmp_path / "scores.csv").write_text("prompt,answer,label\nWhat is tea?,A drink.,1\n")
    with pytest.raises(DataError, match="is not a label that is known"):
        require_labels((refusals, str(tmp_path / "scores.csv")), has_records=True)


def test_the_files_of_labels_are_inputs_of_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = write_labels(tmp_path / "labels.csv", "x", agree=5, missed=0, false=0, right=5)
    first = label_inputs((file,))["labels 1"]["digest"]
    assert validate_judges((file,), run="run")["sentence"] == "refusal-lists@1: kappa 1.00 on x."
    write_labels(tmp_path / "labels.csv", "x", agree=5, missed=1, false=0, right=5)
    assert label_inputs((file,))["labels 1"]["digest"] != first
    with pytest.raises(MissingError, match="There is no file"):
        validate_judges(("nowhere.csv",), run="other")
