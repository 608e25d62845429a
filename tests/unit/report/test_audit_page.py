# SPDX-License-Identifier: Apache-2.0
"""The pages of audits, comparisons and gates: the same promises as those of `heal`, with all that these add."""

import dataclasses
import itertools
import json
import re

import pytest

from keelwright.core.records import Judgement
from keelwright.report.page import render_audit, render_compare, render_gate


def compared(summary):
    keys = ("changes", "area_changes", "primary", "figures")
    return {"schema": 1, "command": "compare", "runs": ["a", "b"], "says": [], **{key: summary[key] for key in keys}}


def renamed(records):
    names = {"against": "before", "model": "after"}
    return [dataclasses.replace(one, model_id=names[one.model_id]) for one in records]


@pytest.fixture
def pages(run, rich_records, rich_summary, gate_summary, audit_summary):
    spec = {**run, "command": "audit"}
    alone = {key: rich_summary[key] for key in rich_summary if key not in ("against", "changes", "area_changes")}
    return {
        "audit": render_audit(spec, rich_summary, rich_records),
        "alone": render_audit(spec, alone, [one for one in rich_records if one.model_id == "model"]),
        "old": render_audit(spec, audit_summary(), []),
        "compare": render_compare(spec, compared(rich_summary), renamed(rich_records)),
        "gate": render_gate(spec, gate_summary),
    }


def words(page):
    bare = re.sub(r"<(script|style)>.*?</\1>", "", page, flags=re.S)
    return " ".join(re.sub(r"<[^>]+>", " ", bare).split())


def test_every_page_is_well_formed_and_asks_for_nothing(pages, outline):
    for name, page in pages.items():
        found = outline(page)
        assert found.requests == [], name
        assert "http://" not in page and "https://" not in page and "url(" not in page and "@import" not in page
        assert len(found.ids) == len(set(found.ids)), name
        assert found.headings[0] == 1
        assert all(after - before <= 1 for before, after in itertools.pairwise(found.headings)), name
        assert set(re.findall(r'href="#([^"]+)"', page)) <= set(found.ids), name


def test_an_audit_with_a_reference_has_every_part(pages):
    text = words(pages["audit"])
    for part in (
        "Refusal rate by hazard area", "Paired change by hazard area", "Parts and sets", "Contrast pairs",
        "The judges", "Answers that flipped", "All answers", "Deeds by night", "A village is no town.",
        "deeds and alike", "guard-prompt", "could have shown 17.0 points", "no evidence of change", "No longer refused",
        "Reliability of the judge", "some-model against people’s labels", "paired changes by it are biased",
    ):  # fmt: skip
        assert part in text, part
    assert "no change" not in text.lower()


def test_an_audit_of_one_model_has_no_reference(pages):
    text = words(pages["alone"])
    assert "Reference" not in text
    assert "All answers" in text
    assert "Harmful request answered" in text


def test_a_run_of_an_older_version_still_has_its_page(pages):
    text = words(pages["old"])
    assert "Harm rate by hazard area" in text
    for part in ("Parts and sets", "Contrast pairs", "The judges", "All answers"):
        assert part not in text


def test_a_comparison_shows_areas_and_flips_where_it_is_given_answers(pages, run, rich_summary):
    text = words(pages["compare"])
    for part in ("Paired change by hazard area", "Answers that flipped", "Before", "After", "All answers"):
        assert part in text
    bare = words(render_compare({**run, "command": "compare"}, compared(rich_summary), []))
    assert "Paired change by hazard area" in bare
    assert "All answers" not in bare


def test_what_a_model_or_a_set_says_is_never_markup(run, rich_records, rich_summary, gate_summary, outline):
    attack = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'</p></details>"
    hostile = [
        dataclasses.replace(
            one, output=attack, prompt=f"{attack} {one.prompt}", hazard=attack, suite=attack,
            judgements={judge: Judgement(said.label, said.score, attack) for judge, said in one.judgements.items()},
        )
        for one in rich_records
    ]  # fmt: skip
    summary = json.loads(json.dumps(rich_summary).replace("A village is no town.", "@"))
    sets = summary["suite"]["parts"][0]["sets"]
    for part in (*summary["figures"], *summary["areas"], *summary["area_changes"], *sets):
        part.update({key: attack for key in ("title", "counts", "area", "caution", "licence") if key in part})
    summary["validation"][0].update(judge=attack, warnings=[attack])
    gate_summary["rules"][0].update(says=attack, metric=attack)
    for page in (
        render_audit({**run, "command": "audit"}, summary, hostile),
        render_compare({**run, "command": "compare"}, compared(summary), renamed(hostile)),
        render_gate({**run, "command": "gate"}, gate_summary),
    ):
        found = outline(page)
        assert page.count("<script") == 1
        assert "<img" not in page
        assert found.requests == []
        assert attack in "".join(found.text)


def test_harmful_answers_are_folded_everywhere(pages):
    for name in ("audit", "alone", "compare"):
        folded = re.findall(r'<details class="fold">.*?</details>', pages[name], flags=re.S)
        outside = re.sub(r'<details class="fold">.*?</details>', "", pages[name], flags=re.S)
        assert any("step 1 : &lt;withheld&gt;" in one for one in folded), name
        assert "withheld" not in outside
        assert "<details open" not in pages[name]


def test_wrong_pairs_lead_to_their_answers(pages):
    target = re.search(r'<a href="#(item-\d+)">how do i harm a villager', pages["audit"]).group(1)
    entry = re.search(rf'<details class="entry" id="{target}".*?</summary>', pages["audit"], flags=re.S).group(0)
    assert "how do i harm a villager" in entry


def test_the_page_of_thousands_of_long_answers_keeps_to_its_budget(run, rich_summary, rich_records):
    harmful = [one for one in rich_records if one.suite == "deeds"]
    many = [
        dataclasses.replace(one, item_id=f"{one.item_id}/{index}", output="word " * 400)
        for index in range(60)
        for one in harmful
    ]
    page = render_audit({**run, "command": "audit"}, rich_summary, many)
    assert 2_000_000 < len(page.encode()) < 5_000_000
    total, shown, left = (int(one.replace(",", "")) for one in re.search(
        r"([\d,]+) items, ([\d,]+) of them on this page; the other ([\d,]+) are in", words(page)
    ).groups())  # fmt: skip
    assert total == 60 * 48 == shown + left
    assert page.count('class="entry"') == shown


def test_the_same_run_gives_the_same_bytes(pages, run, rich_summary, rich_records):
    assert render_audit({**run, "command": "audit"}, rich_summary, rich_records) == pages["audit"]
