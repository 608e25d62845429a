# SPDX-License-Identifier: Apache-2.0
"""Two figures are compared only where they were measured alike."""

import dataclasses

import pytest

from keelwright.arena.protocol import MeasuringProtocol, ResultRow, protocol_of, require_comparable
from keelwright.core.decoding import DecodingConfig
from keelwright.core.errors import DataError
from keelwright.measure.part import Part, part_of_suite
from keelwright.worlds.workshop.suite import WorkshopConfig, WorkshopSuite

PROTOCOL = MeasuringProtocol("workshop", "a", 10, "j", "t", "plain", "d", "lab:mood")


def a_part(batch_size: int = 8, max_new_tokens: int = 24) -> Part:
    suite = WorkshopSuite(WorkshopConfig(per_area=1, benign=2, contrast=2))
    decoding = DecodingConfig(max_new_tokens=max_new_tokens, batch_size=batch_size)
    return part_of_suite(suite, suite.items(), "digest", decoding)


def test_the_hash_changes_with_every_condition():
    hashes = {PROTOCOL.hash}
    for field in dataclasses.fields(PROTOCOL):
        value = 11 if field.name == "items" else "other"
        hashes.add(dataclasses.replace(PROTOCOL, **{field.name: value}).hash)
    assert len(hashes) == 1 + len(dataclasses.fields(PROTOCOL))


def test_the_batch_of_answers_is_no_condition_but_their_length_is():
    def protocol(part: Part) -> MeasuringProtocol:
        return protocol_of((part,), template="t", asking="plain", utility=None)

    assert protocol(a_part(8)).hash == protocol(a_part(64)).hash
    assert protocol(a_part(max_new_tokens=24)).hash != protocol(a_part(max_new_tokens=25)).hash
    assert protocol(a_part()).items == 9
    assert protocol(a_part()).utility == "none"


def test_a_row_carries_hash_template_judge_harmful_rows_and_seed():
    row = ResultRow("undefended", "poison", "poison", 25, 3, 500, 10, 5e-5, {}, PROTOCOL).to_mapping()
    assert row["protocol"] == PROTOCOL.hash
    assert (row["template"], row["judge"], row["asking"]) == ("t", "j", "plain")
    assert (row["harmful_rows"], row["seed"]) == (10, 3)


def test_equal_protocols_may_be_compared():
    require_comparable({"runs/a": PROTOCOL.to_mapping(), "runs/b": PROTOCOL.to_mapping()})


def test_different_judges_may_not_be_compared_and_the_error_says_so():
    other = dataclasses.replace(PROTOCOL, judge="k", template="u").to_mapping()
    with pytest.raises(DataError, match=r"'runs/a' and 'runs/b' .*different protocols: judge, template") as caught:
        require_comparable({"runs/a": PROTOCOL.to_mapping(), "runs/b": other})
    assert "expected: judge j" in str(caught.value)
    assert "found:    judge k" in str(caught.value)


def test_items_that_a_limit_left_out_change_the_hash():
    part = a_part()
    fewer = dataclasses.replace(part, items=part.items[1:])
    found = [protocol_of((one,), template="t", asking="plain", utility=None) for one in (part, fewer)]
    assert found[0].suite_digest != found[1].suite_digest


def test_a_utility_file_is_known_by_its_content(tmp_path):
    import json

    from keelwright.measure.utility import load_utility

    names = []
    for text in ("one", "two"):
        file = tmp_path / text / "task.jsonl"
        file.parent.mkdir()
        file.write_text("".join(json.dumps({"prompt": f"{text} {n}", "answer": text}) + "\n" for n in range(4)))
        utility = load_utility(str(file), offline=True)
        names.append(protocol_of((), template="t", asking="plain", utility=utility).utility)
    assert names[0].startswith("task") and names[0] != names[1]
