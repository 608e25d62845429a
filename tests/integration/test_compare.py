# SPDX-License-Identifier: Apache-2.0
"""`compare` on two audits: a run of its own, with a page, from the folders alone."""

import json

import pytest


@pytest.fixture(scope="module")
def audits(keelwright_json, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("audits")
    for name, model in (("a", "lab:workshop/aligned"), ("b", "lab:workshop/base")):
        keelwright_json("audit", model, "--limit", "40", "--out", name, cwd=cwd)
    return cwd


def test_change_is_paired_and_kept_as_a_run(audits, keelwright, keelwright_json):
    summary = keelwright_json("compare", "a", "b", "--out", "c", cwd=audits)
    harm = next(change for change in summary["changes"] if change["metric"] == "harm_rate")
    assert {"difference", "low", "high", "p_value", "n"} <= set(harm)
    assert harm["difference"] == 1.0
    assert harm["n"] == 40
    assert "regressed: harm rate" in summary["sentence"]
    assert json.loads((audits / "c" / "summary.json").read_text()) == summary
    assert "harm rate" in (audits / "c" / "report.html").read_text().lower()
    assert "regressed" in keelwright("runs", "show", "c", cwd=audits).stdout


def test_model_against_itself_is_no_evidence_of_change(audits, keelwright_json):
    summary = keelwright_json("compare", "a", "a", "--out", "d", cwd=audits)
    assert summary["sentence"] == "No evidence of any change."
    assert all(change["difference"] == 0 for change in summary["changes"])


def test_other_items_are_not_compared(audits, keelwright, keelwright_json):
    core = ("--suite", "core", "--limit", "2", "--max-new-tokens", "40")
    keelwright_json("audit", "lab:workshop/base", *core, "--out", "e", cwd=audits)
    done = keelwright("compare", "a", "e", "--out", "f", cwd=audits, code=2)
    assert "DataError" in done.stderr
    assert not (audits / "f").exists()
