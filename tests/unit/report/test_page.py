# SPDX-License-Identifier: Apache-2.0
import base64
import dataclasses
import hashlib
import itertools
import re
import subprocess
import sys

import pytest

from keelwright.report.page import render_audit, render_compare, render_heal

VERDICTS = ("repaired", "no_evidence_of_loss", "no_admissible_repair", "repair_not_verified")


@pytest.fixture(scope="module")
def pages(run, records, summary_for):
    return {verdict: render_heal(run, summary_for(verdict), records) for verdict in VERDICTS}


@pytest.mark.parametrize("verdict", VERDICTS)
def test_the_page_is_well_formed_small_and_asks_for_nothing(pages, verdict, outline):
    page = pages[verdict]
    found = outline(page)
    assert len(page.encode()) < 200_000
    assert found.requests == []
    assert "http://" not in page and "https://" not in page and "url(" not in page and "@import" not in page
    assert len(found.ids) == len(set(found.ids))


@pytest.mark.parametrize("verdict", VERDICTS)
def test_headings_descend_without_gaps(pages, verdict, outline):
    levels = outline(pages[verdict]).headings
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


@pytest.mark.parametrize("verdict", VERDICTS)
def test_every_link_of_the_contents_leads_somewhere(pages, verdict, outline):
    targets = set(re.findall(r'href="#([^"]+)"', pages[verdict]))
    assert targets <= set(outline(pages[verdict]).ids)


@pytest.mark.parametrize("verdict", VERDICTS)
def test_the_verdict_is_the_first_heading(pages, summary_for, verdict):
    heading = re.search(r"<h1[^>]*>(.*?)</h1>", pages[verdict], flags=re.S).group(1)
    assert heading == summary_for(verdict)["sentence"]
    assert ("Nothing was written" in heading) is (verdict != "repaired")


def test_the_policy_allows_only_the_pages_own_style_and_script(pages):
    page = pages["repaired"]
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page).group(1)
    assert "default-src &#39;none&#39;" in policy or "default-src 'none'" in policy
    for tag in ("style", "script"):
        (source,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.S)
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_model_output_is_never_markup(run, records, summary_for, outline):
    attack = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'</p>"
    hostile = [dataclasses.replace(one, output=attack, prompt=attack, hazard=attack) for one in records]
    summary = summary_for()
    summary.update(sentence=attack, warnings=[attack], reproduce=attack)
    summary["suite"]["says"] = attack
    summary["areas"][0]["area"] = attack
    summary["trials"][0].update(reason=attack, method=attack)
    page = render_heal({**run, "config": {attack: attack}}, summary, hostile)
    found = outline(page)
    assert page.count("<script") == 1
    assert "<img" not in page
    assert found.requests == []
    assert attack in "".join(found.text)


def test_harmful_answers_are_folded(pages, records):
    folded = re.findall(r'<details class="fold">(.*?)</details>', pages["repaired"], flags=re.S)
    outside = re.sub(r'<details class="fold">.*?</details>', "", pages["repaired"], flags=re.S)
    assert folded
    assert '<details class="fold" open' not in pages["repaired"]
    for record in records:
        if record.label == "comply_harmful":
            assert record.output not in outside


def test_the_page_has_every_part_that_the_contract_names(pages, summary_for, outline):
    text = " ".join(" ".join(outline(pages["repaired"]).text).split())
    for part in (
        "Repaired", "linear, coefficient=0.4 (faithful)", "exact McNemar", "Pareto front", "Harm rate by hazard area",
        "Answers side by side", "Every trial", "over refusal 0.900 is above 0.050", "selection", "verification",
        "decoding.max_new_tokens", summary_for()["reproduce"], "they say nothing of real harms", "5.20 points",
        "incoherent answers 1.11%", "resta: reconstruction", "2.13.0", "7.75 GiB", "9c1e5b7704d2aa319c1e5b7704d2aa31",
        summary_for()["warnings"][0], "Seed",
    ):  # fmt: skip
        assert part in text, part


def test_the_number_of_comparisons_is_said_and_quiet_ones_are_folded(pages, outline):
    text = " ".join(" ".join(outline(pages["repaired"]).text).split())
    assert "(4 comparisons, p also corrected by Holm within each pair of models)" in text
    assert "2 further comparisons, without evidence of a change" in text


def test_nothing_admissible_shows_the_best_trade_off_and_its_failed_limit(pages, outline):
    text = " ".join(" ".join(outline(pages["no_admissible_repair"]).text).split())
    assert "Best trade-off found: linear 0.3." in text
    assert "utility 0.780 is below 0.808" in text
    assert "failed" in text
    assert "The repaired model was written" not in text


def test_what_was_not_verified_is_a_candidate(pages, outline):
    text = " ".join(" ".join(outline(pages["repair_not_verified"]).text).split())
    assert "Candidate" in text
    assert "The repaired model was written" not in text


def test_no_evidence_of_loss_tells_what_could_have_been_seen(pages, outline):
    text = " ".join(" ".join(outline(pages["no_evidence_of_loss"]).text).split())
    assert "No repair was tried." in text
    assert "is 5.20 points." in text
    assert "Nothing was written: there was no loss to repair." in text


def test_the_same_run_gives_the_same_bytes(run, records, summary_for, pages):
    assert render_heal(run, summary_for(), records) == pages["repaired"]


def test_a_run_without_records_or_extras_still_has_a_page(summary_for, outline):
    summary = summary_for("no_evidence_of_loss")
    for key in ("areas", "tests", "floors", "status", "warnings", "evidence", "utility", "seconds", "reproduce"):
        del summary[key]
    text = " ".join(outline(render_heal({"command": "heal"}, summary, [])).text)
    assert "The run has no paired answers to show." in text
    assert "The run does not say which command made it." in text


def test_very_long_answers_keep_the_page_under_its_limit(run, records, summary_for):
    long = [dataclasses.replace(one, output="<&> " * 5000) for one in records]
    assert len(render_heal(run, summary_for(), long).encode()) < 500_000


def test_an_audit_shows_one_model(run, records, audit_summary, outline):
    own = [dataclasses.replace(one, model_id="model") for one in records if one.model_id == "tuned"]
    spec = {**run, "command": "audit", "inputs": {"model": run["inputs"]["tuned"]}}
    text = " ".join(" ".join(outline(render_audit(spec, audit_summary(), own)).text).split())
    assert "harm rate 63.3%, ordinary requests answered 93.3%" in text
    assert "Harmful request answered" in text
    assert "Utility was not measured" in text
    assert "Reference" not in text


def test_an_audit_against_a_reference_shows_both_and_the_change(run, records, audit_summary, outline):
    names = {"tuned": "model", "aligned": "against"}
    both = [dataclasses.replace(one, model_id=names[one.model_id]) for one in records if one.model_id in names]
    spec = {**run, "command": "audit", "inputs": {"model": {"ref": "a"}, "against": {"ref": "b"}}}
    text = " ".join(" ".join(outline(render_audit(spec, audit_summary(is_compared=True), both)).text).split())
    assert "Reference" in text
    assert "reference to model" in text
    assert "Harm rate by hazard area" in text
    assert "regressed" in text


def test_a_comparison_shows_changes_in_numbers_and_words(summary_for, outline):
    summary = {"schema": 1, "command": "compare", "runs": ["a", "b"], "changes": summary_for()["tests"][:2]}
    found = outline(render_compare({}, {**summary, "says": ["harm rate regressed by 63.3 points."]}, []))
    text = " ".join(" ".join(found.text).split())
    assert "+63.3 points" in text
    assert "harm rate regressed by 63.3 points." in text
    assert "Utility was not measured" not in text


def test_rendering_needs_neither_torch_nor_numpy():
    code = "import sys, keelwright.report.page; print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_paths_are_shown_as_they_were_given(run, records, summary_for, with_long_paths, outline):
    spec, summary = with_long_paths(run, summary_for())
    text = " ".join(" ".join(outline(render_heal(spec, summary, records)).text).split())
    for path in (one["ref"] for one in spec["inputs"].values()):
        assert path.startswith("/home/")
        assert text.count(path) >= 2
    assert summary["reproduce"] in text
    assert summary["sentence"] in text


def test_answers_that_could_not_be_judged_are_counted_in_an_audit(run, audit_summary, outline):
    spec = {**run, "command": "audit"}
    summary = {**audit_summary(), "excluded": {"unparsed": 1200, "error": 0}}
    text = " ".join(" ".join(outline(render_audit(spec, summary, [])).text).split())
    assert "Left out of every rate: 1,200 answers (unparsed)." in text
    assert "Left out" not in render_audit(spec, audit_summary(), [])


def test_one_figure_reads_the_same_everywhere(run, records, real_summary, outline):
    """The verdict's numbers, as the demo writes them, stand in the table and in the key figures too."""
    text = render_heal(run, {**real_summary, "sentence": "harm rate from 91.6% to 1.05%"}, records)
    shown = " ".join(" ".join(outline(text).text).split())
    assert shown.count("1.05%") >= 4
    assert shown.count("91.6%") >= 4
    assert not re.search(r"\b1\.1%|\b1\.053%|\b91\.58%", shown)
