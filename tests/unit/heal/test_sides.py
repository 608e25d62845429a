# SPDX-License-Identifier: Apache-2.0
"""The two sides of a comparison, read from folders and logs."""

import dataclasses

import pytest

from keelwright.core.errors import ConfigError, DataError
from keelwright.core.records import Judgement, Record
from keelwright.heal.sides import is_log, read_side, sides_of
from keelwright.runs.folder import RunFolder, RunSpec


def record(number, model="model", label="refusal_full", score=None):
    return Record(
        item_id=f"h{number}", suite="set", suite_digest="s0", kind="harmful", hazard="area", prompt="A question?",
        model_id=model, revision="r0", template_digest="t0", decoding_digest="d0", output="No.", n_tokens=3,
        finish="eos", judgements={"lists@1": Judgement(label, score)},
    )  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def make(name, records, *, command="audit", inputs=None, **summary):
        with RunFolder.open(tmp_path / name, RunSpec(command, (), {}, 0, inputs or {})) as run:
            for one in records:
                run.append(one)
            if summary is not None:
                run.finish({"schema": 1, "command": command, **summary})
        return tmp_path / name

    return make


def test_an_audit_of_two_models_holds_both_sides(write):
    folder = write("both", [record(0), record(0, "against"), record(1, "against")], primary="refusal_rate")
    after, before = sides_of(folder, None)
    assert [one.model_id for one in after.records] == ["model"]
    assert [one.model_id for one in before.records] == ["against"] * 2
    assert "reference" in before.name
    assert after.digest == before.digest


def test_an_audit_of_one_model_has_no_other_side(write):
    after, before = sides_of(write("one", [record(0)], primary="refusal_rate"), None)
    assert before is None
    assert after.primary == "refusal_rate"


def test_of_a_repair_the_repaired_model_is_taken_else_the_tuned_one(write):
    records = [record(0, "aligned"), record(0, "tuned"), record(0, "linear coefficient=0.4")]
    ids = {"aligned": "aligned", "tuned": "tuned", "repaired": "linear coefficient=0.4"}
    found = read_side(write("healed", records, command="heal", model_ids=ids))
    assert {one.model_id for one in found.records} == {"linear coefficient=0.4"}
    none = read_side(write("not", records, command="heal", model_ids={**ids, "repaired": None}))
    assert {one.model_id for one in none.records} == {"tuned"}


def test_a_comparison_leads_to_its_two_runs(write):
    ends = {role: write(role, [record(0)], primary="over_refusal") for role in ("before", "after")}
    inputs = {role: {"ref": str(folder), "digest": "x"} for role, folder in ends.items()}
    change = write("change", [], command="compare", inputs=inputs)
    after, before = sides_of(change, None)
    assert (after.name, before.name) == (str(ends["after"]), str(ends["before"]))
    with pytest.raises(ConfigError, match="is a comparison already"):
        sides_of(change, ends["before"])


def test_the_metric_that_decides_is_the_suites_own_else_read_off_the_records(write):
    judged = read_side(write("judged", [record(0, score=5.0, label="comply_harmful")]))
    assert judged.primary == "harm_rate"
    assert judged.metrics[0] == "harm_rate"
    assert read_side(write("lists", [record(0)])).primary == "refusal_rate"
    named = read_side(write("named", [record(0)], primary="asr", suite={"metrics": ["asr", "rr_full"]}))
    assert named.metrics == ("asr", "rr_full")


def test_a_run_without_answers_or_unfinished_is_refused(write, tmp_path):
    with pytest.raises(DataError, match="holds no answers of a model"):
        read_side(write("empty", [], command="gate"))
    with RunFolder.open(tmp_path / "cut", RunSpec("audit", (), {}, 0, {})) as run:
        run.append(dataclasses.replace(record(0)))
    with pytest.raises(DataError, match="is unfinished"):
        read_side(tmp_path / "cut")


def test_logs_are_known_by_their_ending(tmp_path):
    (tmp_path / "a.eval").write_bytes(b"")
    (tmp_path / "b.csv").write_text("")
    assert is_log(tmp_path / "a.eval")
    assert not is_log(tmp_path / "b.csv")
    assert not is_log(tmp_path)
