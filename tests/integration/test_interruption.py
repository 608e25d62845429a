# SPDX-License-Identifier: Apache-2.0
"""Nothing is lost on Ctrl-C and kill -9: the same command resumes and ends as if nothing had happened."""

import json
import signal

import pytest

FREE = ("seconds", "run", "out", "reproduce", "written")


def same(one, other):
    return {key: value for key, value in one.items() if key not in FREE} == {
        key: value for key, value in other.items() if key not in FREE
    }


def words(damage, name):
    return (
        "heal", "lab:workshop/aligned", damage / "tuned", "--out", f"{name}-fixed", "--run", f"{name}-run",
        "--utility", damage / "mood.jsonl", "--unalign-with", damage / "forbidden.jsonl", "--limit", "60",
        "--utility-floor", "0.8", "--slack", "0.2", "--batch-size", "16",
    )  # fmt: skip


def records(path):
    return path.read_bytes().count(b"\n") if path.is_file() else 0


@pytest.fixture(scope="module")
def whole(keelwright_json, damage, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("whole")
    return keelwright_json(*words(damage, "a"), cwd=cwd)


@pytest.mark.parametrize("after", [40, 500])
def test_killed_run_resumes_and_equals_the_uninterrupted_one(
    after, whole, keelwright_json, interrupted, damage, tmp_path
):
    kept = tmp_path / "a-run" / "records.jsonl"
    status, _ = interrupted(*words(damage, "a"), ready=lambda: records(kept) >= after, cwd=tmp_path)
    assert status == -signal.SIGKILL
    assert not (tmp_path / "a-fixed").exists()
    assert same(keelwright_json(*words(damage, "a"), cwd=tmp_path), whole)
    lines = [json.loads(line) for line in kept.read_text().split("\n")[:-1]]
    assert len({(one["model_id"], one["item_id"]) for one in lines}) == len(lines)


def test_ctrl_c_leaves_130_and_says_how_to_go_on(interrupted, damage, tmp_path):
    kept = tmp_path / "a-run" / "records.jsonl"
    status, stderr = interrupted(
        *words(damage, "a"), ready=lambda: records(kept) >= 40, with_signal=signal.SIGINT, cwd=tmp_path
    )
    assert status == 130
    assert "resumes" in stderr
    assert not (tmp_path / "a-fixed").exists()
