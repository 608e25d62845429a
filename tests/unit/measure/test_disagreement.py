# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from keelwright.core.errors import DataError
from keelwright.core.records import Judgement
from keelwright.measure.disagreement import compare_judges, write_disagreement
from keelwright.measure.labels import read_labels


@pytest.fixture
def records(record):
    """Ten on which both say the same, three on which they differ, one that the second could not read."""

    def both(item_id, one, two):
        made = record(item_id, prompt=f"prompt {item_id}", output=f"answer {item_id}")
        return type(made)(
            **{
                **{name: getattr(made, name) for name in made.__slots__},
                "judgements": {"rules@1": Judgement(one), "qi-rubric@1/abc/model": Judgement(two)},
            }
        )

    same = [both(f"s{number}", "refusal_full", "refusal_full") for number in range(5)]
    same += [both(f"c{number}", "comply_harmful", "comply_harmful") for number in range(5)]
    differ = [both(f"d{number}", "comply_unhelpful", "comply_harmful") for number in range(3)]
    return [*same, *differ, both("u", "refusal_full", "unparsed")]


def test_two_judges_are_compared_label_by_label(records):
    found = compare_judges(records, "rules", "qi-rubric")
    assert (found.first, found.second) == ("rules@1", "qi-rubric@1/abc/model")
    assert found.table == {
        ("refusal_full", "refusal_full"): 5,
        ("comply_harmful", "comply_harmful"): 5,
        ("comply_unhelpful", "comply_harmful"): 3,
    }
    assert (found.n, found.excluded, [one.item_id for one in found.records]) == (13, 1, ["d0", "d1", "d2"])
    # Agreed 10/13; by chance (5 * 5 + 5 * 8) / 169.
    assert found.kappa.value == pytest.approx((10 / 13 - 65 / 169) / (1 - 65 / 169))
    assert found.kappa.low < found.kappa.value <= found.kappa.high
    assert found.to_mapping()["differ"] == 3


def test_two_judges_that_say_one_thing_have_no_kappa(records):
    assert compare_judges(records[:5], "rules", "qi-rubric").kappa is None


def test_what_they_disagree_about_is_written_for_people_and_read_back(records, tmp_path):
    path = tmp_path / "disagreement.jsonl"
    write_disagreement(compare_judges(records, "rules", "qi-rubric"), path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["first"] for row in rows] == ["comply_unhelpful"] * 3
    path.write_text("".join(json.dumps({**row, "label": "harmful"}) + "\n" for row in rows))
    labelled = read_labels(path)
    first = labelled[0]
    assert (first.item.prompt, first.answer.output, first.condition) == ("prompt d0", "answer d0", "model")


def test_a_blind_file_does_not_say_what_the_judges_said(records, tmp_path):
    path = tmp_path / "disagreement.jsonl"
    write_disagreement(compare_judges(records, "rules", "qi-rubric"), path, blind=True)
    assert "comply_harmful" not in path.read_text()


def test_a_judge_that_is_not_there_is_named(records):
    with pytest.raises(DataError) as caught:
        compare_judges(records, "rules", "qi-rubrik")
    assert "no judgements of 'qi-rubrik'" in str(caught.value)
    assert "rules@1" in str(caught.value)
    with pytest.raises(DataError, match="several judgements of ''"):
        compare_judges(records, "rules", "")
