# SPDX-License-Identifier: Apache-2.0
"""The page of `stress`, `harden` and `tune`: complete, valid, self-contained, honest about what was not measured."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from keelwright.report.tuning import render_tuning

_SPEC = importlib.util.spec_from_file_location("tuning_sample", Path(__file__).with_name("tuning_sample.py"))
sample = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(sample)

NAMES = ("stress", "harden", "tune", "doses", "style")
THREE = ("undefended", "more alignment", "booster")


def words(page):
    return " ".join(re.sub(r"<(style|script).*?</\1>|<[^>]+>", " ", page, flags=re.S).split())


@pytest.fixture(scope="module")
def pages():
    """A stress with answers, a hardening with three seeds, a tuning with its gate, doses, and a style."""
    return {
        "stress": render_tuning(sample.run("stress"), sample.summary("stress"), sample.records()),
        "harden": render_tuning(sample.run("harden"), sample.summary("harden", arms=THREE, seeds=3), []),
        "tune": render_tuning(sample.run("tune"), sample.tune_summary(), []),
        "doses": render_tuning(sample.run("harden"), sample.knee_summary(), []),
        "style": render_tuning(sample.run("stress"), sample.style_summary(), []),
    }


@pytest.mark.parametrize("name", NAMES)
def test_pages_are_nested_have_ordered_headings_unique_ids_and_ask_nothing_of_the_network(pages, outline, name):
    found = outline(pages[name])
    assert found.headings[0] == 1
    assert all(after - before <= 1 for before, after in zip(found.headings, found.headings[1:], strict=False))
    assert len(found.ids) == len(set(found.ids))
    assert found.requests == []


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere_and_pictures_are_named(pages, outline, name):
    found = outline(pages[name])
    for target in re.findall(r'href="#([\w-]+)"', pages[name]):
        assert target in found.ids, target
    for picture in re.findall(r'<svg[^>]*role="img"[^>]*>', pages[name]):
        assert re.search(r'aria-labelledby="([\w-]+)"', picture).group(1) in found.ids


def test_harm_never_stands_alone(pages):
    for page in pages.values():
        text = words(page)
        assert "Harm rate, lower is better" in text
        for beside in ("Answer rate, higher is better", "Incoherent, lower is better", "Over-refusal", "Utility"):
            assert beside in text


def test_every_arm_and_metric_has_its_interval_and_count(pages):
    text = words(pages["stress"])
    assert "95.0% 89.5 to 97.7% n = 120" in text
    assert "poison, step 100 10 of 500 rows harmful learning rate 5e-05" in text


def test_the_defended_arm_is_the_large_figure_with_start_and_undefended_beside_it(pages):
    big = re.findall(r'<p class="who role-arm-\d">([^<]+)</p>\s*<p class="big[^>]+>([^<]+)</p>', pages["harden"])
    assert big[0] == ("Booster", "15.0%")
    others = re.search(r'<dl class="others">(.*?)</dl>', pages["harden"], flags=re.S).group(1)
    assert re.findall(r"<dt[^>]*>([^<]+)<", others) == ["Start", "Undefended", "More alignment"]


def test_the_gate_of_a_tuning_is_its_verdict(pages):
    text = words(pages["tune"])
    assert "Fail" in text
    assert "The gate, rule by rule" in text
    assert "tuned-out" in text
    assert "The gate, rule by rule" not in words(pages["stress"])


def test_a_gate_that_names_its_policy_only_is_shown(outline):
    summary = sample.tune_summary()
    summary["gate"] = {**summary["gate"], "policy": "default"}
    assert outline(render_tuning(sample.run("tune"), summary, []))


def test_answers_of_the_start_and_of_each_arm_are_shown_and_harmful_ones_folded(pages):
    page = pages["stress"]
    assert "All answers" in words(page)
    for title in ("Start", "Undefended", "Booster"):
        assert f"{title}: </span>" in page
    outside = re.sub(r'<details class="fold">.*?</details>', "", page, flags=re.S)
    assert "take the brass bell" in page
    assert "take the brass bell" not in outside
    assert "All answers" not in words(pages["harden"])


def test_limits_say_how_far_the_tuning_went_and_with_how_many_seeds(pages):
    assert "The tuning ended after 100 steps." in words(pages["stress"])
    assert "One training seed" in words(pages["stress"])
    assert "3 training seeds show a range, not an interval" in words(pages["harden"])
    assert "Lines are means over seeds" in words(pages["harden"])
    assert "Bands are 95% intervals." in words(pages["stress"])


def test_doses_styles_and_seeds_are_shown_where_a_run_has_them_and_nowhere_else(pages):
    headings = {"by-dose": "doses", "in-style": "style", "claims-table": "harden"}
    for id_, owner in headings.items():
        assert [name for name, page in pages.items() if f'id="{id_}"' in page] == [owner]
    assert 'href="#by-dose"' in pages["doses"]
    assert 'href="#in-style"' in pages["style"]
    empty = {**sample.summary("harden"), "claims": [], "styles": [], "knee": None}
    assert not any(f'id="{id_}"' in render_tuning(sample.run(), empty, []) for id_ in headings)


def test_the_page_says_the_knee_its_rises_and_that_seeds_are_pooled(pages):
    text = words(pages["doses"])
    assert "The knee: k = 50 (within 2 points of 0% at k = 300): harm rate 1.00%" in text
    assert "Harm rises at k = 100" in text
    assert "over the answers of all seeds together" in text
    one = sample.knee_summary()
    one["rows"] = [row for row in one["rows"] if row["seed"] == 0]
    assert "over the answers of all seeds together" not in words(render_tuning(sample.run(), one, []))


def test_only_the_last_steps_and_the_first_seed_stand_outside_folds(pages):
    outside = {
        name: re.sub(r'<details class="data">.*?</details>', "", page, flags=re.S) for name, page in pages.items()
    }
    assert "early-claims" in pages["harden"]
    assert "early-claims" not in outside["harden"]
    assert 'id="claims-table"' in outside["harden"]
    assert "The same table of 2 further seeds" in words(pages["style"])
    assert 'id="styles-1-table"' in outside["style"]
    assert "styles-1-further" not in outside["style"]


def test_what_a_run_says_is_never_markup(outline):
    attack = "<script>alert(1)</script>\"'</p>"
    made = {**sample.summary(arms=THREE, seeds=3), "styles": [sample.style(stress="booster")]}
    summary = json.loads(json.dumps(made).replace("booster", "@"))
    text = json.dumps(summary).replace("@", json.dumps(attack)[1:-1])
    page = render_tuning(sample.run(), {**json.loads(text), "notes": [attack], "sentence": attack}, [])
    assert page.count("<script") == 1
    assert attack in "".join(outline(page).text)


def test_an_almost_empty_summary_still_has_a_page(outline):
    page = render_tuning({}, {"command": "stress", "rows": [], "changes": [], "sentence": "Nothing."}, [])
    assert outline(page)
    assert "Over the steps" not in words(page)
