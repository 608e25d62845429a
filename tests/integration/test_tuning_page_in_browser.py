# SPDX-License-Identifier: Apache-2.0
"""The pages of `stress`, `harden` and `tune` in the distribution's Chromium."""

import importlib.util
import shutil
from pathlib import Path

import pytest

from keelwright.report.tuning import render_tuning

playwright = pytest.importorskip("playwright.sync_api", reason="the python package playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path: install the distribution's package"),
]


def module_at(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BROWSER = module_at(Path(__file__).with_name("test_report_in_browser.py"))
SAMPLE = module_at(Path(__file__).parents[1] / "unit" / "report" / "tuning_sample.py")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    made, folder = SAMPLE, tmp_path_factory.mktemp("pages")
    arms = ("undefended", "more alignment", "booster")
    texts = {
        "stress": render_tuning(made.run("stress"), made.summary(), made.records()),
        "several": render_tuning(made.run("stress"), made.two_stresses(), []),
        "harden": render_tuning(made.run("harden"), made.summary("harden", arms=arms, seeds=3), []),
        "tune": render_tuning(made.run("tune"), made.tune_summary(), []),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: (folder / f"{name}.html").as_uri() for name in texts}


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=BROWSER.ARGUMENTS)
        yield started
        started.close()


@pytest.fixture
def visit(browser, pages):
    """Open a page in a fresh profile; afterwards nothing may have been complained about or asked of the network."""
    contexts, complaints, requests = [], [], []

    def go(name, *, width=1280, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(pages[name])
        return page

    yield go
    for context in contexts:
        context.close()
    assert complaints == []
    assert set(requests) <= {*pages.values(), "data:,"}


@pytest.mark.parametrize("name", ["stress", "several", "harden", "tune"])
@pytest.mark.parametrize("width", [360, 400, 768, 1280])
def test_no_page_is_wider_than_its_window(visit, name, width):
    page = visit(name, width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    clipped = """[...document.querySelectorAll('main *')].filter(one => {
        const box = one.getBoundingClientRect();
        return box.width && box.right > innerWidth + 1 && !one.closest('.scroll');
    }).map(one => one.outerHTML.slice(0, 80))"""
    assert page.evaluate(clipped) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["stress", "several", "harden", "tune"])
def test_text_stands_out_from_its_ground(visit, name, scheme):
    assert visit(name, scheme=scheme).evaluate(BROWSER.CONTRAST) == []


@pytest.mark.parametrize("name", ["stress", "several", "harden", "tune"])
def test_no_text_of_a_figure_covers_another(visit, name):
    covered = """[...document.querySelectorAll('figure svg[role=img]')].flatMap(svg => {
        const texts = [...svg.querySelectorAll('text')].map(one => [one.textContent, one.getBoundingClientRect()])
            .filter(one => one[1].width);
        return texts.flatMap(([a, x], i) => texts.slice(i + 1).filter(([b, y]) =>
            x.left < y.right - 1 && y.left < x.right - 1 && x.top < y.bottom - 3 && y.top < x.bottom - 3
        ).map(([b]) => `${svg.id}: ${a} / ${b}`));
    })"""
    for width in (360, 1280):
        assert visit(name, width=width).evaluate(covered) == []


def test_one_drawing_of_each_figure_is_shown(visit):
    for width, shown, hidden in ((1280, "wide", "narrow"), (360, "narrow", "wide")):
        page = visit("stress", width=width)
        for figure in ("steps", "training"):
            assert page.locator(f"#{figure}-{shown}").is_visible()
            assert not page.locator(f"#{figure}-{hidden}").is_visible()
