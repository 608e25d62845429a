# SPDX-License-Identifier: Apache-2.0
"""Sample files of lm-evaluation-harness, built by hand in its format."""

import json

import pytest

from keelwright.core.errors import ConfigError, DataError, MissingError
from keelwright.runs.interop.lm_eval_samples import read_lm_eval_samples

TIME = "2026-01-02T03-04-05.678901"


def generated(doc_id=0, *, filter_name="none", **values):
    values = values or {"exact_match": 1.0}
    return {
        "doc_id": doc_id, "doc": {"q": "?"}, "target": "old",
        "arguments": {"gen_args_0": {"arg_0": f"question {doc_id}", "arg_1": {"until": ["\n"]}}},
        "resps": [["an answer"]], "filtered_resps": ["an answer"], "filter": filter_name,
        "metrics": list(values), "doc_hash": "d", "prompt_hash": "p", "target_hash": "t", **values,
    }  # fmt: skip


def chosen(doc_id=0, logprobs=("-2.5", "-1.5"), **values):
    values = values or {"acc": 0.0, "acc_norm": 1.0}
    return {
        "doc_id": doc_id, "doc": {}, "target": "0",
        "arguments": {
            f"gen_args_{i}": {"arg_0": "the cat sees a", "arg_1": f" {one}"} for i, one in enumerate(("lamp", "river"))
        },
        "resps": [[[one, "False"]] for one in logprobs], "filtered_resps": [[one, "False"] for one in logprobs],
        "filter": "none", "metrics": list(values), **values,
    }  # fmt: skip


RESULTS = {
    "model_name": "org/model",
    "lm_eval_version": "0.4.13",
    "versions": {"quiz": 1.0},
    "n-shot": {"quiz": 5},
    "higher_is_better": {"quiz": {"exact_match": True, "loss": False}},
    "configs": {"quiz": {"generation_kwargs": {"max_gen_toks": 7, "do_sample": False}}},
    "chat_template_sha": None,
}


@pytest.fixture
def write(tmp_path):
    def make(rows, *, results=RESULTS, task="quiz"):
        path = tmp_path / f"samples_{task}_{TIME}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if results is not None:
            (tmp_path / f"results_{TIME}.json").write_text(json.dumps(results))
        return path

    return make


def test_a_document_is_one_record_with_one_judgement_per_metric_and_filter(write):
    rows = [
        generated(doc, filter_name=name, exact_match=float(doc == 1)) for name in ("strict", "none") for doc in (0, 1)
    ]
    log = read_lm_eval_samples(write(rows))
    assert [record.item_id for record in log.records] == ["quiz/0", "quiz/1"]
    assert list(log.records[1].judgements) == ["exact_match,strict", "exact_match"]
    assert [record.label for record in log.records] == ["wrong", "correct"]
    assert log.records[0].prompt == "question 0"
    assert log.records[0].output == "an answer"
    assert log.records[0].facts == {"target": "old"}
    assert log.records[0].max_new_tokens == 7


def test_the_results_file_beside_tells_model_version_and_what_is_better(write):
    log = read_lm_eval_samples(write([generated(0, exact_match=1.0, loss=0.3)]))
    assert (log.program, log.task, log.model, log.created) == ("lm-eval 0.4.13", "quiz", "org/model", TIME)
    assert log.higher_is_better == {"exact_match": True, "loss": False}
    assert log.settings["examples"] == "5"
    assert log.notes == ()


def test_without_the_results_file_the_settings_are_not_recorded_and_a_note_says_so(write):
    log = read_lm_eval_samples(write([generated()], results=None))
    assert log.settings == {}
    assert "no results file beside it" in log.notes[0]
    assert log.records[0].decoding_digest == "not recorded"


def test_the_answer_to_a_choice_is_the_most_likely_option(write):
    log = read_lm_eval_samples(write([chosen(0), chosen(1, ("-1.0", "-9.0"))]))
    assert [record.output for record in log.records] == ["river", "lamp"]
    assert log.scorers == ("acc", "acc_norm")


def test_options_asked_again_without_the_question_do_not_change_the_answer(write):
    row = chosen(0, ("-2.5", "-1.5"))
    row["arguments"] |= {f"gen_args_{2 + i}": {"arg_0": "", "arg_1": f" {w}"} for i, w in enumerate(("lamp", "river"))}
    row["resps"] += [[["-0.1", "True"]], [["-0.2", "False"]]]
    assert read_lm_eval_samples(write([row])).records[0].output == "river"


def test_another_metric_can_come_first(write):
    path = write([chosen(0)])
    assert read_lm_eval_samples(path, scorer="acc_norm").records[0].label == "correct"
    with pytest.raises(ConfigError) as caught:
        read_lm_eval_samples(path, scorer="acc_nrom")
    assert "did you mean 'acc_norm'?" in str(caught.value)


def test_metrics_without_a_value_per_document_are_left_out_and_named(write):
    row = {
        **generated(0, word_perplexity=[-43.2, 5]),
        "resps": [["-43.2"]],
        "arguments": {"gen_args_0": {"arg_0": "text"}},
    }
    log = read_lm_eval_samples(write([row]))
    assert log.scorers == ()
    assert log.records[0].label == "unparsed"
    assert log.records[0].output == ""
    assert "'word_perplexity' has no value per document" in log.notes[0]


def test_task_names_may_hold_underscores_and_dates(write):
    assert read_lm_eval_samples(write([generated()], task="quiz_2026-01-01_v2")).task == "quiz_2026-01-01_v2"


def test_an_empty_file_has_no_records(write):
    log = read_lm_eval_samples(write([]))
    assert (log.records, log.scorers) == ((), ())


def test_a_document_that_is_there_twice_is_refused_with_both_lines(write):
    with pytest.raises(DataError, match=r"jsonl:3: document 0 of 'quiz' is there twice") as caught:
        read_lm_eval_samples(write([generated(0), generated(1), generated(0)]))
    assert ".jsonl:1" in str(caught.value)


@pytest.mark.parametrize("line", ["{", "[]", '"x"', "\ud800".encode("utf-8", "surrogatepass").decode("latin-1")])
def test_a_line_that_is_not_json_is_named(write, line):
    path = write([generated(0)])
    with path.open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(DataError, match=r"jsonl:2: not JSON"):
        read_lm_eval_samples(path)


@pytest.mark.parametrize("missing", ["doc_id", "arguments", "resps", "metrics", "exact_match"])
def test_a_line_without_what_a_sample_has_is_named(write, missing):
    row = generated(1)
    del row[missing]
    with pytest.raises(DataError, match=r"jsonl:2: not a sample") as caught:
        read_lm_eval_samples(write([generated(0), row]))
    assert missing in str(caught.value)


def test_missing_and_damaged_files_are_named(write, tmp_path):
    with pytest.raises(MissingError, match="There is no file"):
        read_lm_eval_samples(tmp_path / "samples.jsonl")
    path = write([generated()], results=[1])
    with pytest.raises(DataError, match=r"results_.*json' is damaged"):
        read_lm_eval_samples(path)
