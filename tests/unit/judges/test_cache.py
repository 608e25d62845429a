# SPDX-License-Identifier: Apache-2.0
"""The cache of verdicts: what is kept, what is not, several processes, a killed one, a damaged file."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import pytest

from keelwright.core.errors import StorageError
from keelwright.core.protocols import Silent
from keelwright.core.records import Judgement
from keelwright.judges.asking import AskingJudge
from keelwright.judges.cache import CachedJudge, VerdictCache, seen_digest
from keelwright.judges.qi import QiForm
from keelwright.judges.refusal import RefusalJudge

WRITER = """
import sys
from pathlib import Path
from keelwright.core.records import Judgement
from keelwright.judges.cache import VerdictCache
path, name, count, wait = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4] == "forever"
cache = VerdictCache(path)
print("ready", flush=True)
number = 0
while number < count or wait:
    cache.put("judge@1", {f"{name}-{number}": Judgement("refusal_full", 1.0, "no")})
    cache.put("judge@1", {f"shared-{number}": Judgement("refusal_full", 1.0, "no")})
    number += 1
"""


class Notes(Silent):
    def __init__(self):
        self.lines = []

    def note(self, text):
        self.lines.append(text)


def writer(path, name, count, wait="no"):
    command = [sys.executable, "-c", WRITER, str(path), name, str(count), wait]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "verdicts" / "cache.sqlite"


def test_a_verdict_is_bought_once(path, scripted, asked, said):
    engine = scripted(lambda prompt: "#thescore: 1")
    for run in range(2):
        judge = CachedJudge(AskingJudge(QiForm(), engine), VerdictCache(path))
        found = judge.judge_all([(asked(), said()), (asked("Another?"), said()), (asked(), said())])
        assert [one.label for one in found] == ["refusal_full"] * 3
        assert (judge.hits, judge.misses) == ((1, 2) if run == 0 else (3, 0))
    assert len(engine.asked) == 2
    assert judge.judge(asked(), said()) == Judgement("refusal_full", 1.0, "#thescore: 1")


def test_neither_requests_nor_answers_are_stored(path, scripted, asked, said):
    cache = VerdictCache(path)
    judge = CachedJudge(AskingJudge(QiForm(), scripted(lambda prompt: "Secretly.\n#thescore: 5")), cache)
    judge.judge(asked("WHISPERED REQUEST"), said("WHISPERED ANSWER"))
    cache.close()
    content = b"".join(file.read_bytes() for file in path.parent.iterdir())
    assert b"#thescore: 5" in content
    assert b"WHISPERED" not in content
    assert b"Secretly" not in content


def test_what_could_not_be_read_is_asked_for_again(path, scripted, asked, said):
    replies = iter(["hm", "hm", "#thescore: 1"])
    judge = CachedJudge(AskingJudge(QiForm(), scripted(lambda prompt: next(replies))), VerdictCache(path))
    assert judge.judge(asked(), said()).label == "unparsed"
    assert judge.judge(asked(), said()).label == "refusal_full"
    assert (judge.hits, judge.misses) == (0, 2)


def test_everything_a_judge_may_see_is_part_of_the_key(asked, said):
    item, generation = asked(), said()
    digest = seen_digest(item, generation)
    changes = {
        "prompt": "Another?",
        "kind": "benign",
        "hazard": "fraud",
        "system": "Be brief.",
        "expected": "42",
        "scorer": "number",
        "facts": {"domain": "QA"},
        "materials": {"profile": "a child"},
    }
    for name, value in changes.items():
        assert seen_digest(dataclasses.replace(item, **{name: value}), generation) != digest, name
    for name, value in {"output": "Sure.", "finish": "length"}.items():
        assert seen_digest(item, dataclasses.replace(generation, **{name: value})) != digest, name
    assert seen_digest(dataclasses.replace(item, item_id="two", suite="other"), generation) == digest
    assert seen_digest(item, dataclasses.replace(generation, seed=7, sample=3)) == digest


def test_judges_do_not_read_each_others_verdicts(path, asked, said):
    cache = VerdictCache(path)
    digest = seen_digest(asked(), said())
    cache.put("one@1", {digest: Judgement("refusal_full")})
    assert cache.get("two@1", [digest]) == {}
    assert cache.get("one@1", [digest]) == {digest: Judgement("refusal_full")}


def test_a_judge_that_asks_nobody_can_be_cached_too(path, asked, said):
    judge = CachedJudge(RefusalJudge(), VerdictCache(path))
    assert judge.judge(asked(), said()).label == "refusal_full"
    assert judge.judge_id == RefusalJudge.judge_id
    assert judge.network is None


def test_many_keys_are_found_at_once(path):
    cache = VerdictCache(path)
    verdicts = {f"k{number}": Judgement("empty", None, None) for number in range(1203)}
    cache.put("judge@1", verdicts)
    assert cache.get("judge@1", list(verdicts)) == verdicts
    assert len(cache) == 1203


def test_several_processes_write_at_once(path):
    crowd = [writer(path, f"p{number}", 60) for number in range(4)]
    assert [one.wait(timeout=60) for one in crowd] == [0] * 4
    for one in crowd:
        one.stdout.close()
    cache = VerdictCache(path)
    assert len(cache) == 5 * 60
    assert len(cache.get("judge@1", [f"p3-{number}" for number in range(60)])) == 60


def test_a_killed_process_leaves_a_cache_that_goes_on(path):
    victim = writer(path, "victim", 0, "forever")
    assert victim.stdout.readline() == "ready\n"
    cache = VerdictCache(path)
    until = time.monotonic() + 30
    while len(cache) < 10 and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    victim.stdout.close()
    notes = Notes()
    after = VerdictCache(path, progress=notes)
    count = len(after)
    assert count >= 10
    assert notes.lines == []
    after.put("judge@1", {"mine": Judgement("empty")})
    assert len(after) == count + 1


@pytest.mark.parametrize("content", [b"this is no database" * 400, b"SQLite format 3\x00" + b"\xff" * 8176])
def test_a_damaged_file_is_set_aside_and_noted(content, path):
    path.parent.mkdir()
    path.write_bytes(content)
    notes = Notes()
    cache = VerdictCache(path, progress=notes)
    assert len(cache) == 0
    cache.put("judge@1", {"k": Judgement("empty")})
    assert len(VerdictCache(path)) == 1
    assert (path.parent / "cache.sqlite.damaged-1").read_bytes() == content
    assert len(notes.lines) == 1
    assert "set aside as 'cache.sqlite.damaged-1', begun anew" in notes.lines[0]


def test_a_file_that_is_damaged_while_it_is_open_is_set_aside_too(path):
    cache = VerdictCache(path, progress=(notes := Notes()))
    cache.put("judge@1", {f"k{number}": Judgement("empty", raw="x" * 500) for number in range(200)})
    cache.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + b"\x00" * (len(whole) - 4096))
    again = VerdictCache(path, progress=notes)
    assert again.get("judge@1", ["k1"]) == {}
    again.put("judge@1", {"k1": Judgement("empty")})
    assert again.get("judge@1", ["k1"]) == {"k1": Judgement("empty")}
    assert len(notes.lines) == 1


def test_a_place_that_cannot_hold_a_file_is_an_error_that_says_so(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match="cannot be used") as caught:
        VerdictCache(tmp_path / "file" / "cache.sqlite")
    assert "choose another place" in str(caught.value)
    with pytest.raises(StorageError, match="cannot be used"):
        VerdictCache(tmp_path)
