# SPDX-License-Identifier: Apache-2.0
"""Whatever is wrong with what a user gives: the right exit code, what was expected and found, what to do, no debris."""

import errno
import importlib.resources
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from keelwright.cli.app import app

ALIGNED = "lab:workshop/aligned"
SHIPPED = Path(str(importlib.resources.files("keelwright"))) / "organisms" / "workshop"
WEIGHTS = "model.safetensors"
RUN = CliRunner()
BAD, MACHINE = 2, 3


def files():
    """Everything below the working folder, with its size."""
    return {str(path): path.stat().st_size for path in sorted(Path.cwd().rglob("*"))}


def refused(*words, code, says, leaves=()):
    """Run the command as text and as JSON: both refuse, say the same, and leave nothing but `leaves`."""
    before = files()
    words = [str(word) for word in words]
    text = RUN.invoke(app, words)
    assert text.exit_code == code, (text.stdout, text.stderr, text.exception)
    assert text.stdout == ""
    for part in (says, "\n  expected: ", "\n  found:    ", "\n  fix:      "):
        assert part in text.stderr
    made = set(files()) - set(before)
    assert {Path(path).name for path in made if Path(path).parent == Path.cwd()} == set(leaves)
    document = RUN.invoke(app, [*words, "--json"])
    assert document.exit_code == code
    error = json.loads(document.stdout)["error"]
    assert error["exit_code"] == code
    assert says in error["problem"]
    assert error["expected"] and error["found"] and error["fix"]
    if not leaves:
        assert files() == before
    return text.stderr


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def copy(here):
    return Path(shutil.copytree(SHIPPED / "base", "copy"))


def heal(tuned, *more, aligned=ALIGNED):
    return ("heal", aligned, tuned, "--out", "fixed", "--no-utility", "--offline", *more)


def repair(tuned, *more, aligned=ALIGNED):
    return ("repair", "linear", "--aligned", aligned, "--tuned", tuned, "--out", "fixed", "--offline", *more)


def audit(model, *more):
    return ("audit", model, "--suite", "workshop", "--limit", "2", "--offline", *more)


VERBS = pytest.mark.parametrize("verb", [heal, repair, audit])


def rewrite(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def poison(value, name="model.norm.weight", index=3):
    def change(tensors):
        tensors[name][index] = value

    return lambda folder: rewrite(folder, change)


def empty(folder):
    for path in folder.iterdir():
        path.unlink()


def make_adapter(folder):
    empty(folder)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "base"}))
    save_file({"a": torch.ones(1)}, folder / "adapter_model.safetensors")


def pickle(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def truncate(folder):
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 9)


def lie(folder):
    raw = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["model.norm.weight"]["shape"] = [1]
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def escape(folder):
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"a": "../../etc/model.safetensors"}}))


BAD_FOLDERS = {
    "no checkpoint": (empty, MACHINE, "is not a model folder"),
    "an adapter alone": (make_adapter, BAD, "is an adapter, not a full model"),
    "pickled weights": (pickle, BAD, "are pickled"),
    "a truncated file": (truncate, BAD, "is cut short"),
    "a lying header": (lie, BAD, "does not fit its range of bytes"),
    "an escaping index": (escape, BAD, "names a file outside its folder"),
    "not a number": (poison(float("nan")), BAD, "'model.norm.weight'"),
    "infinity": (poison(float("inf")), BAD, "'model.norm.weight'"),
}


@VERBS
@pytest.mark.parametrize("kind", BAD_FOLDERS)
def test_a_bad_model_folder(kind, verb, copy):
    spoil, code, says = BAD_FOLDERS[kind]
    spoil(copy)
    refused(*verb("copy"), code=code, says=says)


@VERBS
def test_a_full_model_given_as_adapter(verb, copy):
    refused(*verb(f"{ALIGNED}+copy"), code=BAD, says="is a full model, not an adapter")


@VERBS
def test_a_misspelt_hub_id_without_network(verb, here):
    text = refused(*verb("some-org/misspelt-nmae"), code=MACHINE, says="the hub cannot be asked")
    assert "OfflineError" in text
    assert "check the spelling" in text


def test_a_misspelt_hub_id_in_a_process_of_its_own(keelwright, tmp_path):
    done = keelwright("audit", "some-org/misspelt-nmae", "--json", cwd=tmp_path, code=MACHINE)
    assert json.loads(done.stdout)["error"]["type"] == "OfflineError"
    assert list(tmp_path.iterdir()) == []


def drop(tensors):
    del tensors["model.norm.weight"]


def reshape(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()


def other_words(folder):
    path = folder / "tokenizer.json"
    spoilt = json.loads(path.read_text())
    vocabulary = spoilt["model"]["vocab"]
    one, other = sorted(vocabulary)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(spoilt))


def other_template(folder):
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text() + " ")


MISFITS = {
    "tensors": (lambda folder: rewrite(folder, drop), "do not have the same tensors"),
    "shapes": (lambda folder: rewrite(folder, reshape), "have tensors of different shapes"),
    "tokenizers": (other_words, "have different tokenizers"),
    "chat templates": (other_template, "have different chat templates"),
}


@pytest.mark.parametrize("verb", [heal, repair])
@pytest.mark.parametrize("kind", MISFITS)
def test_two_models_that_do_not_fit(kind, verb, copy):
    spoil, says = MISFITS[kind]
    spoil(copy)
    refused(*verb("copy"), code=BAD, says=says)


def test_repair_takes_another_template_when_told_to(copy):
    other_template(copy)
    done = RUN.invoke(app, [str(word) for word in repair("copy", "--allow-template-change", "--force")])
    assert done.exit_code == 0, done.stderr
    assert (Path("fixed") / WEIGHTS).is_file()


def test_an_audit_against_another_template(copy):
    other_template(copy)
    refused(*audit("copy", "--against", ALIGNED), code=BAD, says="different chat templates")


def test_pickled_weights_are_audited_when_allowed(copy):
    pickle(copy)
    done = RUN.invoke(app, [*audit("copy", "--out", "r"), "--allow-pickle", "--json"])
    assert done.exit_code == 0, (done.stderr, done.exception)
    assert json.loads(done.stdout)["metrics"]["harm_rate"]["n"] == 2


@VERBS
def test_too_little_memory(verb, copy, monkeypatch):
    for module in ("models.memory", "weights.plan"):
        monkeypatch.setattr(f"keelwright.{module}.available_bytes", lambda *_: 1000, raising=False)
    refused(*verb("copy", *(("--force",) if verb is repair else ())), code=MACHINE, says="needs more memory")


def test_too_little_memory_for_the_demo(here, monkeypatch):
    monkeypatch.setattr("keelwright.models.memory.available_bytes", lambda *_: 1000)
    refused("demo", "--out", "d", code=MACHINE, says="needs more memory")


TASKS = {
    "empty": ("\n\n", "holds no tasks"),
    "not JSON": ('{"prompt": "a", "answer": "b"}\n{"prompt"\n', "line 2"),
    "no answer": ('{"prompt": "a", "answer": "b"}\n\n{"prompt": "a"}\n', "line 3"),
    "unknown scorer": ('{"prompt": "a", "answer": "b", "scorer": "exakt"}\n', "there is no scorer 'exakt'"),
    "one task": ('{"prompt": "a", "answer": "b"}\n', "too few tasks"),
}


@pytest.mark.parametrize("kind", TASKS)
def test_a_bad_task_file(kind, here):
    text, says = TASKS[kind]
    Path("tasks.jsonl").write_text(text)
    words = ("heal", ALIGNED, "lab:workshop/base", "--out", "fixed", "--utility", "tasks.jsonl")
    refused(*words, code=BAD, says=says)
    if kind != "one task":
        refused(*audit(ALIGNED, "--utility", "tasks.jsonl"), code=BAD, says=says)


def test_a_task_file_that_is_not_there(here):
    refused(*audit(ALIGNED, "--utility", "tsaks.jsonl"), code=MACHINE, says="There is no utility 'tsaks.jsonl'")


def test_a_text_alone_has_no_ratio(here):
    Path("text.txt").write_text("some words " * 200)
    refused(*audit(ALIGNED, "--utility", "text.txt"), code=BAD, says="measured against another model")


@pytest.mark.parametrize(("text", "says"), [("", "holds no rows"), ('{"prompt": "a"}\n', "line 1"), ("x\n", "line 1")])
def test_bad_rows_to_unalign_with(text, says, here):
    Path("rows.jsonl").write_text(text)
    refused(*heal("lab:workshop/base", "--unalign-with", "rows.jsonl"), code=BAD, says=says)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (heal("lab:workshop/base", "--methods", "liner"), BAD, "There is no repair method 'liner'"),
        (heal("lab:workshop/base", "--methods", "resta"), BAD, "needs an un-aligned model"),
        (heal("lab:workshop/base", "--suite", "wrokshop"), BAD, "'suite' is not a known choice"),
        (heal("lab:workshop/base", "--device", "tpu"), BAD, "There is no device 'tpu'"),
        (heal("lab:workshop/base", "--slack", "2"), BAD, "'slack' is out of range"),
        (heal("lab:workshop/base")[:-2], BAD, "what the tuning was for"),
        (heal("lab:workshop/base", "--run", "fixed/run"), BAD, "lies inside the folder of the model"),
        (heal("lab:workshop/none"), MACHINE, "no shipped organism 'lab:workshop/none'"),
        (repair("lab:workshop/base", "--coefficient", "much"), BAD, "'--coefficient' is not a number"),
        (repair("lab:workshop/base", "--coefficient", "1.5"), BAD, "'coefficient' is out of range"),
        (repair("lab:workshop/base", "--coefficient", "nan"), BAD, "'coefficient' is out of range"),
        (repair("lab:workshop/base", "--unaligned", ALIGNED), BAD, "does not read a model for 'unaligned'"),
        (("repair", "lienar", *repair(ALIGNED)[2:]), BAD, "There is no repair method 'lienar'"),
        (audit(ALIGNED, "--device", "tpu"), BAD, "There is no device 'tpu'"),
        (("methods", "liner"), BAD, "There is no method 'liner'"),
        (("lab", "build", "wrokshop"), BAD, "'name' is not a known choice"),
        (("lab", "show", "lab:workshop/none"), MACHINE, "no shipped organism"),
        (("demo", "--device", "tpu"), BAD, "There is no device 'tpu'"),
        (("runs", "show", "nowhere"), BAD, "is not a run folder"),
        (("runs", "report", "nowhere"), BAD, "is not a run folder"),
        (("runs", "replay", "nowhere", "--out", "again"), BAD, "is not a run folder"),
        (("compare", "nowhere", "nowhere"), BAD, "is not a run folder"),
    ],
)  # fmt: skip
def test_a_wrong_word(words, code, says, here):
    refused(*words, code=code, says=says)


OUTPUTS = {
    "heal": (*heal("lab:workshop/base")[:3], "--no-utility", "--out"),
    "heal's run": (*heal("lab:workshop/base"), "--run"),
    "repair": (*repair("lab:workshop/base", "--force")[:-4], "--force", "--out"),
    "audit": (*audit(ALIGNED), "--out"),
    "demo": ("demo", "--out"),
    "lab build": ("lab", "build", "--out"),
}


@pytest.mark.parametrize("verb", OUTPUTS)
def test_an_output_folder_that_is_taken(verb, here):
    Path("taken").mkdir()
    Path("taken/thesis.tex").write_text("x")
    assert "thesis.tex" in refused(*OUTPUTS[verb], "taken", code=MACHINE, says="is not empty")


@pytest.mark.parametrize("verb", OUTPUTS)
@pytest.mark.parametrize("path", ["file", "file/below"])
def test_a_file_in_the_way(verb, path, here):
    Path("file").write_text("x")
    text = refused(*OUTPUTS[verb], path, code=MACHINE, says="is a file" if path == "file" else "cannot be made")
    assert "folder" in text


@pytest.mark.parametrize("verb", ["heal's run", "repair", "audit", "demo"])
def test_a_read_only_disk(verb, here):
    # Nobody makes folders in /sys, root included; on systems without it the root folder is as firm.
    refused(*OUTPUTS[verb], "/sys/keelwright", code=MACHINE, says="'/sys/keelwright")


def test_a_full_disk_keeps_what_is_finished_and_resumes(here, monkeypatch):
    words = [str(word) for word in repair("lab:workshop/base", "--force")]

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        text = refused(*words, code=MACHINE, says="is full", leaves=["fixed.partial"])
        assert "resumes" in text
    assert RUN.invoke(app, words).exit_code == 0
    assert not Path("fixed.partial").exists()


def test_another_demo_or_run_in_the_folder_is_left_alone(here):
    Path("d/inputs").mkdir(parents=True)
    Path("d/inputs/demo.json").write_text('{"seed": 1}')
    refused("demo", "--out", "d", code=MACHINE, says="holds another demo")
    done = RUN.invoke(app, [*audit(ALIGNED), "--out", "a"])
    assert done.exit_code == 0
    refused("demo", "--out", "a", code=MACHINE, says="is not empty")
    refused(*audit("lab:workshop/base"), "--out", "a", code=MACHINE, says="holds another run")
    refused(*heal("lab:workshop/base"), "--run", "a", code=MACHINE, says="holds another run")


def test_an_unfinished_run_is_neither_shown_as_a_result_nor_compared(here):
    assert RUN.invoke(app, [*audit(ALIGNED), "--out", "a"]).exit_code == 0
    Path("a/summary.json").unlink()
    for words in (("compare", "a", "a"), ("runs", "report", "a"), ("runs", "replay", "a", "--out", "b")):
        refused(*words, code=BAD, says="is unfinished")
    assert "unfinished: audit" in RUN.invoke(app, ["runs", "show", "a"]).stdout
