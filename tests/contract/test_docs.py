# SPDX-License-Identifier: Apache-2.0
"""The documentation tells the truth: pages exist, links resolve, the reference is what the docstrings say."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def reference():
    """Return the module that writes the reference pages."""
    found = importlib.util.spec_from_file_location("make_reference", ROOT / "docs" / "make_reference.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["methods.md", "metrics.md", "suites.md", "judges.md"])
def test_reference_is_what_the_code_says(page):
    written = (ROOT / "docs" / "reference" / page).read_text(encoding="utf-8")
    assert written == reference().PAGES[page](), "run: .venv/bin/python docs/make_reference.py"


def test_every_page_that_is_made_is_compared():
    assert set(reference().PAGES) == {"methods.md", "metrics.md", "suites.md", "judges.md"}


def test_every_page_of_the_navigation_exists():
    def pages(node):
        if isinstance(node, str):
            yield node
        elif isinstance(node, dict):
            for child in node.values():
                yield from pages(child)
        else:
            for child in node:
                yield from pages(child)

    named = set(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    written = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert named == written


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_local_links_resolve(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target).exists(), target


def test_every_skip_in_the_tests_has_a_row():
    rows = (ROOT / "tests" / "SKIPS.md").read_text(encoding="utf-8")
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if path.name != "test_docs.py" and re.search(r"pytest\.skip\(|mark\.skip|importorskip", path.read_text()):
            assert path.name in rows, f"{path.name} can skip but has no row in tests/SKIPS.md"
