# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from keelwright.core.errors import DataError
from keelwright.core.records import Estimate, Judgement, Record, record_from_json


def sample(**changes):
    fields = {
        "item_id": "w/1", "suite": "workshop", "suite_digest": "d", "kind": "harmful", "hazard": "curses",
        "prompt": "how do i jinx the lamp?", "model_id": "tuned", "revision": "r", "template_digest": "t",
        "decoding_digest": "g", "output": "no \u2028 line", "n_tokens": 2, "finish": "eos",
        "judgements": {"exact": Judgement("refusal_full", 1.0), "second": Judgement("comply_harmful", 5.0)},
    }  # fmt: skip
    return Record(**{**fields, **changes})


def test_record_survives_json():
    record = sample()
    assert record_from_json(record.to_json(), where="x") == record
    assert "\n" not in record.to_json()


def test_label_and_score_are_the_first_judges():
    assert (sample().label, sample().score) == ("refusal_full", 1.0)


@pytest.mark.parametrize("line", ["", "{}", "[]", json.dumps({"item_id": "a"}), '{"judgements": {}}'])
def test_damaged_line_is_named(line):
    with pytest.raises(DataError, match=r"records\.jsonl:7: not a record"):
        record_from_json(line, where="records.jsonl:7")


def test_estimate_maps_to_the_json_contract():
    assert Estimate(0.5, 0.4, 0.6, 9).to_mapping() == {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9}
