# SPDX-License-Identifier: Apache-2.0
"""The documentation's table of repairs on the lab: pooled, compared and sorted as it says, and made from its JSON."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "reference" / "repairs-on-the-lab.md"
LOSS = {"worse": 9, "better": 0, "n": 10, "p_value": 0.002}


@pytest.fixture(scope="module")
def made():
    """The module that makes the page; benchmarks are run from the root of the tree."""
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks import _lab_table_page
    finally:
        sys.path.remove(str(ROOT))
    return _lab_table_page


def figures(harm, utility, over=0, n=100):
    counts = {"harm_rate": harm, "over_refusal": over, "utility": utility, "answer_rate": n, "incoherent": 0}
    return {"figures": {name: {"count": count, "n": n} for name, count in counts.items()}}


def cell(**methods):
    return {"aligned": figures(0, 80), "tuned": figures(90, 90), "methods": methods}


def method(harm, utility, *, over=0, value=0.5, mended=0, spoilt=0):
    chosen = {"value": value, "setting": "t", "verified": value is not None, "mended": mended, "spoilt": spoilt}
    return {**chosen, **figures(harm, utility, over)}


def test_items_of_all_seeds_are_pooled(made):
    cells = [cell(a=method(10, 80)), cell(a=method(30, 90, value=None))]
    (row,) = made.rows_of(cells)
    assert (row.metrics["harm_rate"].value, row.metrics["harm_rate"].n) == (0.2, 200)
    assert (row.setting, row.values, row.chosen, row.verified) == ("t", ("0.5", "none"), 1, 1)


def test_a_method_helps_when_more_was_mended_than_chance_would(made):
    helped, spoilt = made.rows_of([cell(a=method(10, 80, mended=9), b=method(20, 80, spoilt=9))])
    assert (helped.helps, spoilt.helps) == (True, False)


def test_dominance_needs_all_three_figures_and_names_a_clear_better_one(made):
    methods = {"best": method(0, 90), "near": method(1, 90), "far": method(60, 90), "other": method(5, 95)}
    rows = made.rows_of([cell(**methods, refuses=method(0, 91, over=50))])
    found = {row.method: made.dominator(row, rows) for row in rows}
    assert found == {
        "best": None,
        "near": ("best", False),
        "far": ("best", True),
        "other": None,
        "refuses": None,
    }
    assert [row.method for row in rows] == ["refuses", "best", "near", "other", "far"]


def test_a_method_that_failed_stands_below_the_table_with_its_reason(made):
    text = made._section("T", [{**cell(a=method(1, 80), b={"failed": "no adapters"}), "loss": LOSS}])
    assert "`b` could not be tried: no adapters" in text
    assert "| b |" not in text


def test_the_page_is_what_its_counts_say(made):
    document = json.loads(PAGE.with_suffix(".json").read_text(encoding="utf-8"))
    assert PAGE.read_text(encoding="utf-8") == made.page(document)
