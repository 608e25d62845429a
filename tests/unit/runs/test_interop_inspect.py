# SPDX-License-Identifier: Apache-2.0
"""Logs of Inspect, built by hand in its format, and runs exported as such."""

import json
import struct
import sys
import zipfile
import zlib

import pytest

from keelwright.core.errors import ConfigError, DataError, MissingError, StorageError, UnsafeInputError
from keelwright.core.records import Judgement, Record
from keelwright.runs.folder import RunFolder, RunSpec, read_run
from keelwright.runs.interop import archive
from keelwright.runs.interop.inspect_export import write_inspect_log
from keelwright.runs.interop.inspect_log import read_inspect_log


def sample(item=1, epoch=1, scores=None, **changes):
    fields = {
        "id": item,
        "epoch": epoch,
        "input": f"question {item}?",
        "target": "yes",
        "output": {
            "model": "mock/m",
            "choices": [{"message": {"content": "yes", "role": "assistant"}, "stop_reason": "stop"}],
            "completion": "yes",
            "usage": {"input_tokens": 3, "output_tokens": 2, "total_tokens": 5},
        },
        "scores": {"match": {"value": "C", "explanation": "said so"}} if scores is None else scores,
        "metadata": {},
        "attachments": {},
    }
    return {**fields, **changes}


def header(**changes):
    fields = {
        "version": 2,
        "status": "success",
        "eval": {
            "created": "2026-01-02T03:04:05+00:00",
            "task": "quiz",
            "task_version": 0,
            "dataset": {"name": "quiz-set"},
            "model": "mock/m",
            "config": {"epochs": 2},
            "packages": {"inspect_ai": "0.3.285"},
        },
        "plan": {"steps": [{"solver": "generate", "params": {}}], "config": {"temperature": 0.5}},
        "stats": {},
    }
    return {**fields, **changes}


def write_eval(path, samples, head=None, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as log:
        for one in samples:
            log.writestr(f"samples/{one['id']}_epoch_{one['epoch']}.json", json.dumps(one))
        for name, content in members.items():
            log.writestr(name, content)
        log.writestr("header.json", json.dumps(header() if head is None else head))
    return path


def write_json(path, samples, head=None):
    path.write_text(json.dumps({**(header() if head is None else head), "samples": samples, "reductions": []}))
    return path


WRITERS = {".eval": write_eval, ".json": write_json}


@pytest.fixture(params=WRITERS)
def write(request, tmp_path):
    return lambda samples, head=None, name="log": WRITERS[request.param](
        tmp_path / (name + request.param), samples, head
    )


def test_a_sample_becomes_a_record_with_its_epoch_cluster_and_tokens(write):
    log = read_inspect_log(
        write([sample("a", 2, metadata={"cluster": 7, "hazard": "theft", "note": "x" * 500, "hard": True})])
    )
    record = log.records[0]
    assert (record.item_id, record.sample, record.samples, record.cluster_id) == ("a", 1, 2, "7")
    assert (record.prompt, record.output, record.finish) == ("question a?", "yes", "eos")
    assert (record.n_tokens, record.n_prompt_tokens) == (2, 3)
    assert (record.suite, record.kind, record.hazard, record.model_id) == ("inspect:quiz", "task", "theft", "mock/m")
    assert record.facts == {"cluster": "7", "hazard": "theft", "hard": "True"}
    assert record.judgements == {"match": Judgement("correct", 1.0, "said so")}
    assert (log.program, log.task, log.status, log.notes) == ("inspect 0.3.285", "quiz", "success", ())


@pytest.mark.parametrize(
    ("value", "label", "score"),
    [
        ("C", "correct", 1.0), ("I", "wrong", 0.0), ("P", "wrong", 0.5), ("N", "wrong", 0.0),
        (True, "correct", 1.0), (0.25, "wrong", 0.25), (7, "unparsed", 7.0), ("1", "correct", 1.0),
        (float("nan"), "unparsed", None), ("maybe", "unparsed", None), (None, "unparsed", None),
    ],
)  # fmt: skip
def test_scores_are_read_by_one_rule(write, value, label, score):
    log = read_inspect_log(write([sample(scores={"s": {"value": value}})]))
    opinion = log.records[0].judgements["s"]
    assert (opinion.label, opinion.score) == (label, score)


def test_a_score_of_several_values_is_several_judgements_and_the_primary_is_chosen_by_name(write):
    scores = {"match": {"value": "I"}, "grades": {"value": {"tone": 0.5, "facts": [1, 0]}}}
    path = write([sample(scores=scores)])
    log = read_inspect_log(path)
    assert log.scorers == ("match", "grades.tone", "grades.facts.0", "grades.facts.1")
    assert log.records[0].label == "wrong"
    chosen = read_inspect_log(path, scorer="grades.facts.0")
    assert next(iter(chosen.records[0].judgements)) == "grades.facts.0"
    assert chosen.records[0].label == "correct"
    with pytest.raises(ConfigError, match="not a known choice") as caught:
        read_inspect_log(path, scorer="grades.tones")
    assert "did you mean 'grades.tone'?" in str(caught.value)


def test_the_headline_of_the_log_comes_first(write):
    results = {"headline": {"scorer": "grades", "score": "tone", "metric": "mean"}, "scores": []}
    scores = {"match": {"value": "I"}, "grades": {"value": {"tone": 0.5}}}
    log = read_inspect_log(write([sample(scores=scores)], header(results=results)))
    assert log.primary == "grades.tone"


def test_errors_and_samples_without_a_score_are_counted_and_kept(write):
    failed = sample(2, scores={}, error={"message": "no", "traceback": "", "traceback_ansi": ""}, output={})
    log = read_inspect_log(write([sample(1), failed, sample(3, scores={})], header(status="error")))
    assert [record.label for record in log.records] == ["correct", "error", "unparsed"]
    assert log.records[1].finish == "error"
    assert "its status is 'error'" in log.notes[0]
    assert "1 of 3 samples without an answer" in log.notes[1]
    assert "1 of 3 samples without any score" in log.notes[2]


def test_messages_choices_and_attachments_become_text(write):
    told = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "attachment://k1"}, {"type": "image", "image": "data:"}]},
    ]
    log = read_inspect_log(write([sample(input=told, choices=["red", "blue"], attachments={"k1": "Which colour?"})]))
    assert log.records[0].prompt == "system: Be brief.\n\nuser: Which colour?\n<image>\nA) red\nB) blue"


@pytest.mark.parametrize(
    ("change", "finish"),
    [
        ({"limit": {"type": "token", "limit": 5}}, "length"),
        ({"output": {"choices": [{"message": {"content": "a"}, "stop_reason": "max_tokens"}]}}, "length"),
        ({"output": {"choices": []}}, "error"),
    ],
)
def test_how_a_sample_ended_is_kept(write, change, finish):
    assert read_inspect_log(write([sample(**change)])).records[0].finish == finish


def test_an_empty_log_has_no_records(write):
    log = read_inspect_log(write([]))
    assert (log.records, log.scorers, log.is_ours) == ((), ("none",), False)


def test_the_settings_that_decide_an_answer_decide_the_digest_and_retries_do_not(write):
    def digest(config):
        plan = {"steps": [], "config": config}
        return read_inspect_log(write([sample()], header(plan=plan))).records[0].decoding_digest

    assert digest({"temperature": 0.5}) != digest({"temperature": 0.6})
    assert digest({"temperature": 0.5}) == digest({"temperature": 0.5, "max_retries": 3, "max_connections": 9})


def test_a_sample_that_is_there_twice_is_refused_by_number(tmp_path):
    with pytest.raises(DataError, match="'1', epoch 1, twice") as caught:
        read_inspect_log(write_json(tmp_path / "log.json", [sample(2), sample(1), sample(1)]))
    assert "samples number 2 and 3" in str(caught.value)


def test_another_version_of_the_schema_is_refused(write):
    with pytest.raises(DataError, match="another version") as caught:
        read_inspect_log(write([], header(version=3)))
    assert "version 3" in str(caught.value)


def test_a_malformed_sample_is_named(tmp_path):
    bad = sample(2)
    del bad["input"]
    with pytest.raises(DataError, match=r"member 'samples/2_epoch_1\.json': not a sample"):
        read_inspect_log(write_eval(tmp_path / "log.eval", [sample(1), bad]))
    with pytest.raises(DataError, match=r"sample 2: not a sample") as caught:
        read_inspect_log(write_json(tmp_path / "log.json", [sample(1), bad]))
    assert "KeyError: 'input'" in str(caught.value)
    with pytest.raises(DataError, match="sample 1: not a sample"):
        read_inspect_log(write_json(tmp_path / "list.json", [[1]]))


@pytest.mark.parametrize(
    "text", ["", "[]", '{"version": 2, "eval": {', '{"samples": [{"id": 1},]}', "nonsense", "{1: 2}"]
)
def test_a_json_log_that_is_cut_off_says_where(tmp_path, text):
    path = tmp_path / "log.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"character \d+|not a log of Inspect"):
        read_inspect_log(path)


def test_json_is_read_in_pieces_and_numbers_at_the_edge_of_a_piece_stay_whole(tmp_path, monkeypatch):
    from keelwright.runs.interop import json_stream

    path = tmp_path / "x.json"
    value = {"a": 12345.5, "list": [[1, 2], {"b": "€ \\"}, -17, True], "z": {"c": [None]}}
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
    for size in range(1, 12):
        monkeypatch.setattr(json_stream, "_CHUNK", size)
        assert list(json_stream.iterate_list(path, "list", largest=100)) == value["list"]
        rest = json_stream.read_without_list(path, "list", enough=frozenset({"z"}), largest=100)
        assert rest == {"a": 12345.5, "z": {"c": [None]}}
    assert list(json_stream.iterate_list(path, "none", largest=100)) == []
    with pytest.raises(UnsafeInputError, match="one value is too large"):
        list(json_stream.iterate_list(path, "list", largest=4))


def test_a_log_that_is_still_being_written_is_read_as_far_as_it_goes(tmp_path):
    path = tmp_path / "log.eval"
    begun = {key: value for key, value in header().items() if key in ("version", "eval", "plan")}
    with zipfile.ZipFile(path, "w") as log:
        log.writestr("_journal/start.json", json.dumps(begun))
        log.writestr("samples/1_epoch_1.json", json.dumps(sample()))
    log = read_inspect_log(path)
    assert (log.status, len(log.records)) == ("started", 1)
    assert "its status is 'started', so samples may be missing" in log.notes[0]


@pytest.mark.parametrize(
    "change", [{"plan": [1]}, {"plan": {"steps": [{}]}}, {"eval": {"config": {"epochs": "many"}}}, {"results": [1]}]
)
def test_a_header_that_cannot_be_used_is_named(write, change):
    with pytest.raises(DataError, match="The header of"):
        read_inspect_log(write([sample()], header(**change)))


def test_samples_marked_as_invalid_are_counted(write):
    log = read_inspect_log(write([sample(1), sample(2, invalidation={"author": "x"})], header(invalidated=True)))
    assert "it was marked as invalid" in log.notes[0]
    assert "1 of 2 samples marked as invalid" in log.notes[1]


def test_shards_are_refused(write):
    head = header()
    head["eval"]["shards"] = {"selection": "ids", "ledger": []}
    with pytest.raises(DataError, match="split over shards"):
        read_inspect_log(write([], head))


def test_files_that_are_no_log_are_refused(tmp_path):
    with pytest.raises(MissingError, match="There is no file"):
        read_inspect_log(tmp_path / "none.eval")
    path = tmp_path / "log.eval"
    path.write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(DataError, match="not a whole zip archive"):
        read_inspect_log(path)
    with zipfile.ZipFile(path, "w") as log:
        log.writestr("readme.txt", "x")
    with pytest.raises(DataError, match="not a log of Inspect") as caught:
        read_inspect_log(path)
    assert "readme.txt" in str(caught.value)


def test_a_damaged_member_is_named(tmp_path):
    path = write_eval(tmp_path / "log.eval", [sample()])
    raw = bytearray(path.read_bytes())
    raw[70] ^= 0xFF
    path.write_bytes(bytes(raw))
    with pytest.raises(DataError, match=r"samples/1_epoch_1\.json' cannot be read"):
        read_inspect_log(path)


@pytest.mark.parametrize(
    "name", ["../escape.json", "/etc/escape.json", "samples/../../x.json", "samples\\..\\..\\x.json"]
)
def test_a_path_that_leaves_the_archive_is_refused(tmp_path, name):
    path = write_eval(tmp_path / "log.eval", [sample()], **{name: "{}"})
    with pytest.raises(UnsafeInputError, match="names a file outside itself"):
        read_inspect_log(path)


def test_a_member_that_would_fill_the_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = write_eval(tmp_path / "log.eval", [sample(input="x" * 500_000)])
    with pytest.raises(UnsafeInputError, match="is too large"), archive.Archive(path, largest_member=100_000):
        pass
    monkeypatch.setattr(archive, "_SMALL", 1000)
    monkeypatch.setattr(archive, "MOST_EXPANSION", 50)
    with pytest.raises(UnsafeInputError, match="expands beyond reason"):
        read_inspect_log(path)


def packed_zip(path, members, *, declared=None):
    """Write a zip whose members are compressed with Zstandard, method 93."""
    import zstandard

    body, central = b"", b""
    for name, content in members.items():
        halves = [content[: len(content) // 2], content[len(content) // 2 :]]
        packed = b"".join(zstandard.ZstdCompressor().compress(half) for half in halves)
        size = len(content) if declared is None else declared
        fields = struct.pack("<HHHHHIIIHH", 63, 0, 93, 0, 0, zlib.crc32(content), len(packed), size, len(name), 0)
        central += b"PK\x01\x02" + struct.pack("<H", 63) + fields + struct.pack("<HHHII", 0, 0, 0, 0, len(body))
        central += name.encode()
        body += b"PK\x03\x04" + fields + name.encode() + packed
    end = struct.pack("<HHHHIIH", 0, 0, len(members), len(members), len(central), len(body), 0)
    path.write_bytes(body + central + b"PK\x05\x06" + end)
    return path


def zstd_members():
    return {
        "samples/1_epoch_1.json": json.dumps(sample(input="x" * 3_000_000)).encode(),
        "header.json": json.dumps(header()).encode(),
    }


def test_members_compressed_with_zstandard_in_several_frames_are_read(tmp_path):
    pytest.importorskip("zstandard")
    log = read_inspect_log(packed_zip(tmp_path / "log.eval", zstd_members()))
    assert len(log.records[0].prompt) == 3_000_000


def test_a_zstandard_member_cannot_grow_beyond_what_it_declares(tmp_path):
    pytest.importorskip("zstandard")
    path = packed_zip(tmp_path / "log.eval", zstd_members(), declared=1000)
    with pytest.raises(DataError, match="more or fewer bytes than the archive says"):
        read_inspect_log(path)


def test_a_missing_zstandard_is_named(tmp_path, monkeypatch):
    pytest.importorskip("zstandard")
    path = packed_zip(tmp_path / "log.eval", zstd_members())
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(MissingError, match="compressed with Zstandard") as caught:
        read_inspect_log(path)
    assert "keelwright[inspect]" in str(caught.value)


def record(number, model="tuned", **changes):
    kind = ("harmful", "benign", "contrast", "task")[number % 4]
    opinions = {
        "harmful": {"exact@1": Judgement("refusal_full", 1.0, "a rule"), "second@1": Judgement("unparsed")},
        "benign": {"exact@1": Judgement("safe_completion")},
        "contrast": {"exact@1": Judgement("refusal_partial", None, "")},
        "task": {"task@1": Judgement("correct", 1.0, "exact")},
    }
    fields = {
        "item_id": f"core/x/{number:03d}", "suite": "core", "suite_digest": "s0", "kind": kind, "hazard": "theft",
        "prompt": f"What is {number}? \u2028", "model_id": model, "revision": "r0", "template_digest": "t0",
        "decoding_digest": "d0", "output": "Step 1: <withheld>", "n_tokens": 3, "finish": "eos",
        "judgements": opinions[kind], "cluster_id": f"c{number // 2}", "pair_id": f"p{number}" if number % 3 else None,
        "licence": "MIT", "facts": {"domain": "QA", "kind": "x"} if number % 2 else {}, "max_new_tokens": 64,
        "n_prompt_tokens": 5 if number % 2 else None, "seed": number if number % 5 else None,
    }  # fmt: skip
    return Record(**{**fields, **changes})


def make_run(folder, records, *, finished=True):
    spec = RunSpec(
        "audit", ("keelwright", "audit"), {"suite": "core"}, 0, {"tuned": {"ref": "models/x", "digest": "1"}}
    )
    with RunFolder.open(folder, spec) as run:
        for one in records:
            run.append(one)
        if finished:
            run.finish({"schema": 1})
    return folder


def test_an_exported_run_reads_back_as_the_records_that_it_was(tmp_path):
    run = make_run(tmp_path / "run", [record(i, model) for model in ("aligned", "tuned") for i in range(12)])
    files = write_inspect_log(run, tmp_path / "logs")
    assert len(files) == 2
    logs = [read_inspect_log(file) for file in files]
    assert [one for log in logs for one in log.records] == read_run(run).records()
    assert all(log.is_ours and log.notes == () for log in logs)
    assert [log.model for log in logs] == ["keelwright/aligned", "keelwright/models/x"]


def test_samples_of_an_item_are_epochs_and_a_failed_answer_is_an_error(tmp_path):
    several = [record(0, sample=k, samples=2) for k in (0, 1)]
    failed = record(1, finish="error", output="", judgements={"exact@1": Judgement("error", raw="no output")})
    run = make_run(tmp_path / "run", [*several, failed], finished=False)
    [file] = write_inspect_log(run, tmp_path / "log.eval")
    log = read_inspect_log(file)
    assert list(log.records) == [*several, failed]
    assert log.status == "cancelled"
    with zipfile.ZipFile(file) as members:
        assert "samples/core/x/000_epoch_2.json" in members.namelist()
        head = json.loads(members.read("header.json"))
        assert json.loads(members.read("summaries.json"))[2]["error"] == "the model gave no answer"
    assert head["eval"]["config"] == {"epochs": 2}
    assert head["results"]["scores"][0]["metrics"]["refusal_rate"] == {
        "name": "refusal_rate", "value": 1.0, "params": {}, "metadata": {"n": 2},
    }  # fmt: skip


def test_the_header_has_the_rates_of_the_audit_with_their_intervals(tmp_path):
    from keelwright.measure.metrics import rate

    records = [record(i) for i in range(24)]
    [file] = write_inspect_log(make_run(tmp_path / "run", records), tmp_path / "log.eval")
    with zipfile.ZipFile(file) as members:
        scores = {one["name"]: one["metrics"] for one in json.loads(members.read("header.json"))["results"]["scores"]}
    for judge, name in (("exact@1", "over_refusal"), ("exact@1", "answer_rate"), ("task@1", "utility")):
        wanted = rate(records, name)
        found = scores[judge][name]
        assert (found["value"], found["metadata"]) == (
            wanted.value, {"low": wanted.low, "high": wanted.high, "n": wanted.n},
        )  # fmt: skip
    assert scores["second@1"] == {}


def test_the_same_run_gives_the_same_bytes(tmp_path):
    run = make_run(tmp_path / "run", [record(i) for i in range(5)])
    first, second = (write_inspect_log(run, tmp_path / name)[0].read_bytes() for name in ("a.eval", "b.eval"))
    assert first == second


def test_of_a_record_that_was_made_again_the_newest_is_exported(tmp_path):
    run = make_run(tmp_path / "run", [record(0, output="old"), record(1), record(0, output="new")])
    [file] = write_inspect_log(run, tmp_path / "log.eval")
    assert sorted(one.output for one in read_inspect_log(file).records) == ["Step 1: <withheld>", "new"]


def test_a_lone_surrogate_does_not_stop_an_export(tmp_path):
    run = make_run(tmp_path / "run", [record(0)])
    path = run / "records.jsonl"
    path.write_text(path.read_text().replace("Step 1", "\\udc80"))
    [file] = write_inspect_log(run, tmp_path / "log.eval")
    assert read_inspect_log(file).records[0].output.startswith("\udc80")


def test_one_file_takes_one_model(tmp_path):
    run = make_run(tmp_path / "run", [record(0, "aligned"), record(0, "tuned")])
    with pytest.raises(ConfigError, match="several models") as caught:
        write_inspect_log(run, tmp_path / "log.eval")
    assert "one of aligned, tuned" in str(caught.value)
    with pytest.raises(ConfigError, match="has no model 'tuend'") as caught:
        write_inspect_log(run, tmp_path / "log.eval", model_id="tuend")
    assert "did you mean 'tuned'?" in str(caught.value)
    write_inspect_log(run, tmp_path / "log.eval", model_id="tuned")
    assert {one.model_id for one in read_inspect_log(tmp_path / "log.eval").records} == {"tuned"}


def test_nothing_is_overwritten_and_nothing_half_written_stays(tmp_path):
    run = make_run(tmp_path / "run", [record(0)])
    (tmp_path / "log.eval").write_text("mine")
    with pytest.raises(StorageError, match="is there already"):
        write_inspect_log(run, tmp_path / "log.eval")
    assert (tmp_path / "log.eval").read_text() == "mine"
    with (run / "records.jsonl").open("a") as stream:
        stream.write("nonsense\n")
    with pytest.raises(DataError, match=r"records\.jsonl:2: not a record"):
        write_inspect_log(run, tmp_path / "out" / "log.eval")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_run_without_records_is_named(tmp_path):
    with pytest.raises(DataError, match="has no records"):
        write_inspect_log(make_run(tmp_path / "run", []), tmp_path / "log.eval")


def test_a_score_that_was_changed_in_the_viewer_is_read_as_changed(tmp_path):
    run = make_run(tmp_path / "run", [record(3)])
    [file] = write_inspect_log(run, tmp_path / "log.eval")
    with zipfile.ZipFile(file) as log:
        changed = json.loads(log.read("samples/core/x/003_epoch_1.json"))
        head = json.loads(log.read("header.json"))
    changed["scores"]["task@1"] = {"value": "I", "explanation": "a person looked"}
    with zipfile.ZipFile(tmp_path / "changed.eval", "w") as log:
        log.writestr("samples/core/x/003_epoch_1.json", json.dumps(changed))
        log.writestr("header.json", json.dumps(head))
    [back] = read_inspect_log(tmp_path / "changed.eval").records
    assert back.judgements == {"task@1": Judgement("wrong", 0.0, "a person looked")}
