# SPDX-License-Identifier: Apache-2.0
"""The real programs: Inspect writes logs, reads ours and shows them; lm-evaluation-harness runs a model in memory."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.parse
import urllib.request

import pytest
import torch
import yaml

from keelwright.core.errors import ConfigError, DataError, MissingError, OfflineError
from keelwright.core.records import Judgement, Record
from keelwright.models.loading import LoadedModel
from keelwright.runs.folder import RunFolder, RunSpec, read_run
from keelwright.runs.interop.compare_logs import compare_logs, open_log
from keelwright.runs.interop.inspect_export import write_inspect_log
from keelwright.runs.interop.inspect_log import read_inspect_log
from keelwright.runs.interop.lm_eval_samples import read_lm_eval_samples

TASK = """
import sys
from inspect_ai import Task, eval
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ModelOutput, ModelUsage, get_model
from inspect_ai.scorer import Score, accuracy, includes, mean, scorer
from inspect_ai.solver import generate


@scorer(metrics={"tone": [mean()], "facts": [mean()]})
def grades():
    async def score(state, target):
        return Score(value={"tone": 0.25, "facts": len(state.output.completion)}, explanation="counted")
    return score


folder, suffix, every = sys.argv[1], sys.argv[2], int(sys.argv[3])
outputs = [ModelOutput.from_content("mockllm/model", "no" if i % every == 0 else "yes it is") for i in range(30)]
for output in outputs:
    output.usage = ModelUsage(input_tokens=3, output_tokens=4, total_tokens=7)
samples = [
    Sample(input=f"question {i}?", target="yes", id=i if i % 2 else f"s{i}", metadata={"hazard": "theft", "cluster": i})
    for i in range(10)
]
task = Task(dataset=MemoryDataset(samples, name="ten"), solver=[generate()], scorer=[includes(), grades()], epochs=3,
            name="tiny")
[log] = eval(task, model=get_model("mockllm/model", custom_outputs=outputs), log_dir=folder, log_format=suffix,
             display="none", max_connections=1, max_samples=1)
assert log.status == "success", log.error
"""

READ = """
import json, sys
from inspect_ai.log import read_eval_log, read_eval_log_sample, write_eval_log
log = read_eval_log(sys.argv[1])
one = read_eval_log_sample(sys.argv[1], id=log.samples[-1].id, epoch=log.samples[-1].epoch)
assert one.output.completion == log.samples[-1].output.completion
for suffix in ("eval", "json"):
    write_eval_log(log, f"{sys.argv[2]}.{suffix}")
print(json.dumps({
    "status": log.status, "task": log.eval.task, "model": log.eval.model, "samples": len(log.samples),
    "scores": {name: score.value for name, score in log.samples[0].scores.items()},
    "unknown": sorted(set(json.loads(sys.argv[3])) - set(type(log.samples[0]).model_fields)),
    "metrics": {s.name: {m: v.value for m, v in s.metrics.items()} for s in log.results.scores},
}))
"""


@pytest.fixture(scope="session")
def inspect_python():
    """Return a Python that has inspect_ai: the one that KEELWRIGHT_INSPECT names, else this one."""
    named = os.environ.get("KEELWRIGHT_INSPECT")
    if named is None and importlib.util.find_spec("inspect_ai") is None:
        pytest.skip("the extra inspect is not installed, and KEELWRIGHT_INSPECT names no Python that has inspect_ai")
    return named or sys.executable


def run_python(python, code, *arguments):
    done = subprocess.run(
        [python, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "INSPECT_LOG_LEVEL": "error", "NO_COLOR": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="session")
def logs(inspect_python, tmp_path_factory):
    """Return logs that Inspect wrote of a task with two scorers and three epochs: of two models, in two formats."""
    folder = tmp_path_factory.mktemp("logs")
    found = {}
    for name, suffix, every in (("better", "eval", 30), ("worse", "eval", 3), ("worse", "json", 3)):
        run_python(inspect_python, TASK, folder / name / suffix, suffix, every)
        [found[name, suffix]] = (folder / name / suffix).glob(f"*.{suffix}")
    return found


@pytest.fixture
def exported(tmp_path):
    """Return a run of two models and the logs that it was exported to."""
    records = [_record(number, model) for model in ("aligned", "tuned") for number in range(12)]
    spec = RunSpec("audit", ("keelwright", "audit"), {"suite": "core"}, 0, {})
    with RunFolder.open(tmp_path / "run", spec) as run:
        for record in records:
            run.append(record)
        run.finish({"schema": 1})
    return tmp_path / "run", write_inspect_log(tmp_path / "run", tmp_path / "logs")


def _record(number, model):
    opinions = {"exact@1": Judgement("refusal_full", 1.0, "a rule")}
    kind = "harmful"
    if number % 3 == 0:
        opinions, kind = {"task@1": Judgement("correct", 1.0, "exact"), "other@1": Judgement("wrong", 0.0)}, "task"
    return Record(
        f"core/x/{number}", "core", "s0", kind, "theft", f"What is {number}? é \u2028", model, "r0", "t0", "d0",
        "Step 1: <withheld>", 3, "eos", opinions, cluster_id=f"c{number}", facts={"domain": "QA"}, max_new_tokens=64,
    )  # fmt: skip


@pytest.mark.parametrize("suffix", ["eval", "json"])
def test_a_log_that_inspect_wrote_is_read_with_its_epochs_and_both_scorers(logs, suffix):
    log = read_inspect_log(logs["worse", suffix])
    assert (log.task, log.model, log.status, log.notes) == ("tiny", "mockllm/model", "success", ())
    assert log.scorers == ("includes", "grades.tone", "grades.facts")
    assert len(log.records) == 30
    assert {(record.item_id, record.sample) for record in log.records} == {
        (str(i) if i % 2 else f"s{i}", epoch) for i in range(10) for epoch in range(3)
    }
    labels = [record.label for record in log.records]
    assert (labels.count("wrong"), labels.count("correct")) == (10, 20)
    right = next(record for record in log.records if record.label == "correct")
    assert right.judgements["grades.tone"] == Judgement("wrong", 0.25, "counted")
    assert right.judgements["grades.facts"] == Judgement("unparsed", 9.0, "counted")
    assert (right.output, right.finish, right.hazard, right.samples) == ("yes it is", "eos", "theft", 3)


def test_both_formats_of_the_same_log_compare_as_no_change_and_two_models_as_a_loss(logs):
    better, worse = (open_log(logs[name, "eval"]) for name in ("better", "worse"))
    again = open_log(logs["worse", "json"])
    assert {change.difference for change in compare_logs(worse, again)} == {0.0}
    changes = {change.metric: change for change in compare_logs(better, worse)}
    # Every item lost one of its three epochs, but one that had lost it before.
    assert changes["includes"].verdict == "regressed"
    assert (changes["includes"].n, changes["includes"].worse) == (10, 9)
    assert changes["includes"].difference == pytest.approx(-0.3)
    assert changes["grades.facts"].unit == "score"
    assert changes["grades.tone"].verdict == "no evidence of change"


def test_inspect_reads_an_exported_run_and_what_it_writes_again_is_the_same_run(inspect_python, exported, tmp_path):
    import zipfile

    run, files = exported
    for file, model in zip(files, ("aligned", "tuned"), strict=True):
        with zipfile.ZipFile(file) as archive:
            written = json.loads(archive.read("samples/core/x/1_epoch_1.json"))
        told = json.loads(run_python(inspect_python, READ, file, tmp_path / model, json.dumps(list(written))))
        assert set(told["unknown"]) <= {"uuid"}  # which releases of 2025 do not know and ignore
        assert (told["status"], told["task"], told["samples"]) == ("success", "keelwright-audit", 12)
        assert told["scores"] == {"task@1": "C", "other@1": "I"}
        assert told["metrics"]["exact@1"]["refusal_rate"] == 1.0
        wanted = [record for record in read_run(run).records() if record.model_id == model]
        for suffix in ("eval", "json"):
            back = read_inspect_log(tmp_path / f"{model}.{suffix}")
            assert sorted(back.records, key=lambda record: record.item_id) == sorted(
                wanted, key=lambda one: one.item_id
            )
            assert back.is_ours


def test_the_viewer_of_inspect_serves_an_exported_run(inspect_python, exported):
    _, files = exported
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = "from inspect_ai._cli.main import main; main()"
    arguments = ["view", "start", "--log-dir", str(files[0].parent), "--port", str(port)]
    server = subprocess.Popen(
        [inspect_python, "-c", command, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        listed = json.loads(_fetched(f"http://127.0.0.1:{port}/api/logs", server))
        assert len(listed["files"]) == 2
        name = next(one["name"] for one in listed["files"] if "audit-tuned" in one["name"])
        whole = json.loads(_fetched(f"http://127.0.0.1:{port}/api/logs/{urllib.parse.quote(name, safe='')}", server))
        assert whole["eval"]["model"] == "keelwright/tuned"
        assert whole["results"]["total_samples"] == 12
    finally:
        server.terminate()
        server.wait(timeout=30)


def _fetched(address, server):
    for _ in range(300):
        try:
            with urllib.request.urlopen(address, timeout=10) as answer:
                return answer.read()
        except (urllib.error.URLError, ConnectionError) as error:
            assert not isinstance(error, urllib.error.HTTPError), error
            assert server.poll() is None, "the viewer ended"
            time.sleep(0.1)
    raise AssertionError("the viewer did not start")


WORDS = ["<pad>", "<bos>", "<end>", "<unk>", "the", "cat", "sees", "a", "lamp", "old", "river", "and", "stone", "dog"]


@pytest.fixture
def make_model():
    """Build a random Llama of 14 words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    def make(seed=0):
        words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
        words.pre_tokenizer = WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=words, bos_token="<bos>", eos_token="<end>", unk_token="<unk>"
        )
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=64, initializer_range=1.0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        return LoadedModel(LlamaForCausalLM(config).eval(), tokenizer, f"tiny {seed}", f"r{seed}")

    return make


@pytest.fixture
def task_file(tmp_path):
    """Write a task over local data: a choice between two words, or what follows, with two filters."""
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    words = ["lamp", "dog", "river", "stone", "cat", "old", "and", "the"]
    rows = [
        {"q": f"the cat sees a {word}", "options": ["lamp", "river"], "gold": i % 2} for i, word in enumerate(words)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")

    def make(kind="multiple_choice", **changes):
        task = {
            "task": f"tiny_{kind}", "dataset_path": "json", "test_split": "test", "output_type": kind,
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}, "doc_to_text": "{{q}}",
            "metadata": {"version": 1.0},
        }  # fmt: skip
        if kind == "multiple_choice":
            task |= {"doc_to_target": "{{gold}}", "doc_to_choice": "{{options}}"}
            task["metric_list"] = [
                {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
            ]
        elif kind == "generate_until":
            task |= {"doc_to_target": "lamp", "generation_kwargs": {"until": ["<end>"], "max_gen_toks": 4}}
            task["metric_list"] = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
            first = {"function": "take_first"}
            word = {"function": "regex", "regex_pattern": r"^(\w+)"}
            task["filter_list"] = [{"name": "word", "filter": [word, first]}, {"name": "whole", "filter": [first]}]
        else:
            task |= {"doc_to_text": "", "doc_to_target": "{{q}}", "metric_list": [{"metric": "word_perplexity"}]}
        path = tmp_path / f"{task['task']}.yaml"
        path.write_text(yaml.safe_dump({**task, **changes}))
        return path

    return make


def utility(*tasks, **settings):
    from keelwright.measure.lm_eval_tasks import LmEvalConfig, LmEvalUtility

    return LmEvalUtility(LmEvalConfig(tuple(map(str, tasks)), **settings))


def test_tasks_of_the_harness_run_on_a_model_in_memory_and_leave_it_as_it_was(make_model, task_file):
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    torch.manual_seed(7)
    stream = torch.random.get_rng_state()
    measured = utility(task_file(), task_file("generate_until"))
    items, records = measured.items(), measured.records(model, model_id="tuned")
    assert [record.item_id for record in records] == [item.item_id for item in items]
    assert {record.suite for record in records} == {"lm-eval:tiny_multiple_choice", "lm-eval:tiny_generate_until"}
    assert [list(record.judgements) for record in records[::8]] == [
        ["acc", "acc_norm"], ["exact_match,word", "exact_match,whole"],
    ]  # fmt: skip
    assert all(record.label in ("correct", "wrong") and record.model_id == "tuned" for record in records)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.module.state_dict().items())
    assert model.tokenizer.pad_token is None
    assert torch.equal(stream, torch.random.get_rng_state())


def test_the_harness_gives_the_answer_that_the_logits_give(make_model, task_file):
    model = make_model(3)
    for item, record in zip((one := utility(task_file())).items(), one.records(model), strict=True):
        ids = model.tokenizer(item.prompt, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            logits = model.module(input_ids=ids).logits[0, -1]
        options = {word: logits[WORDS.index(word)].item() for word in ("lamp", "river")}
        wanted = max(options, key=options.get)
        assert record.output == wanted
        assert record.label == ("correct" if ("lamp", "river").index(wanted) == int(item.expected) else "wrong")


def test_documents_are_asked_in_halves_and_up_to_a_limit(make_model, task_file):
    model, path = make_model(), task_file()
    every = {record.item_id: record for record in utility(path).records(model)}
    half = utility(path).records(model, item_ids=list(every)[1::2])
    assert half == [every[item] for item in list(every)[1::2]]
    assert [record.item_id for record in utility(path, limit=3).records(model)] == list(every)[:3]
    assert utility(path).records(model, item_ids=[]) == []


def test_two_models_are_compared_on_the_documents_of_a_task(make_model, task_file):
    from keelwright.measure.compare import compare_records

    measured = utility(task_file())
    [change] = compare_records(measured.records(make_model(0)), measured.records(make_model(5)))
    assert (change.metric, change.n) == ("utility", 8)


def test_a_task_that_cannot_be_paired_is_refused(make_model, task_file):
    with pytest.raises(DataError, match="gives no value per document") as caught:
        utility(task_file("loglikelihood_rolling")).records(make_model())
    assert "word_perplexity" in str(caught.value)


def test_a_task_whose_data_is_not_here_says_so_before_any_work(task_file):
    path = task_file(dataset_path="no-such-owner/no-such-data", dataset_kwargs={})
    with pytest.raises(OfflineError, match="is not on this machine") as caught:
        utility(path, offline=True).prepare()
    assert "give a task file over local data" in str(caught.value)


def test_missing_files_bad_task_files_and_empty_names_are_named(task_file, tmp_path):
    from keelwright.measure.lm_eval_tasks import lm_eval_utility

    with pytest.raises(MissingError, match="There is no task file"):
        lm_eval_utility(f"lm-eval:{tmp_path}/none.yaml").prepare()
    with pytest.raises(DataError, match="cannot be loaded"):
        utility(
            task_file(test_split="nowhere", dataset_kwargs={"data_files": {"test": str(tmp_path / "gone")}})
        ).prepare()
    with pytest.raises(ConfigError, match="No task is named"):
        lm_eval_utility("lm-eval:")


def test_a_missing_extra_is_named(monkeypatch):
    from keelwright.measure.lm_eval_tasks import lm_eval_utility

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingError) as caught:
        lm_eval_utility("lm-eval:hellaswag")
    assert 'pip install "keelwright[lm-eval]"' in str(caught.value)


def test_samples_that_the_harness_wrote_read_as_the_records_that_it_gave_in_memory(make_model, task_file, tmp_path):
    import lm_eval
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, paths = make_model(), [task_file(), task_file("generate_until")]
    direct = {record.item_id: record for record in utility(*paths).records(model)}
    tracker = EvaluationTracker(output_path=str(tmp_path / "out"))
    results = lm_eval.simple_evaluate(
        HFLM(pretrained=make_model().module, tokenizer=make_model().tokenizer, batch_size=8),
        tasks=[str(path) for path in paths],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
        evaluation_tracker=tracker,
    )
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for name, rows in samples.items():
        tracker.save_results_samples(name, rows)
    files = sorted((tmp_path / "out").rglob("samples_*.jsonl"))
    assert len(files) == 2
    for file in files:
        log = read_lm_eval_samples(file)
        assert log.notes == ()
        assert log.task == file.name[len("samples_") : -len("_2026-01-02T03-04-05.678901.jsonl")]
        for record in log.records:
            known = direct[record.item_id]
            assert (record.prompt, record.output, record.judgements) == (known.prompt, known.output, known.judgements)
            assert (record.suite, record.suite_digest, record.facts) == (known.suite, known.suite_digest, known.facts)
        score = {
            name: results["results"][log.task].get(name if "," in name else f"{name},none") for name in log.scorers
        }
        for name, value in score.items():
            assert value == pytest.approx(sum(r.judgements[name].score for r in log.records) / len(log.records))


SCALE = """
import re, sys
from pathlib import Path
from keelwright.runs.interop import inspect_export, inspect_log, parquet
# Not ru_maxrss: a child begins with its parent's.
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
exec(sys.argv[1])
print((peak() - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the greatest memory of a process is read the Linux way")
def test_fifty_thousand_records_are_exported_and_read_in_bounded_memory(tmp_path):
    folder = tmp_path / "run"
    spec = RunSpec("audit", ("keelwright", "audit"), {}, 0, {})
    RunFolder.open(folder, spec)
    with (folder / "records.jsonl").open("w") as stream:
        stream.writelines(
            _record(number, "tuned").to_json().replace("<withheld>", "<withheld> " * 50) + "\n"
            for number in range(50_000)
        )

    def grown(code):
        return int(run_python(sys.executable, SCALE, code).split()[-1])

    # Over 50 MB of records: the export holds their keys, the reader the records themselves and one sample.
    assert (folder / "records.jsonl").stat().st_size > 50_000_000
    assert grown(f"inspect_export.write_inspect_log(Path({str(folder)!r}), Path({str(tmp_path / 'x.eval')!r}))") < 90
    listed = grown(f"from keelwright.runs.folder import read_run; kept = read_run(Path({str(folder)!r})).records()")
    assert grown(f"kept = inspect_log.read_inspect_log(Path({str(tmp_path / 'x.eval')!r}))") < 1.5 * listed
    if importlib.util.find_spec("pyarrow"):
        table = tmp_path / "x.parquet"
        assert grown(f"parquet.write_parquet(Path({str(folder)!r}), Path({str(table)!r}))") < 220
        assert grown(f"print(sum(1 for _ in parquet.read_parquet(Path({str(table)!r}))))") < 220
