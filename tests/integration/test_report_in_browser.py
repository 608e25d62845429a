# SPDX-License-Identifier: Apache-2.0
"""The report in the distribution's Chromium, opened from the disk with nothing but the file itself."""

import importlib.util
import itertools
import re
import shutil
from pathlib import Path

import pytest

from keelwright.report.page import render_audit, render_heal

playwright = pytest.importorskip("playwright.sync_api", reason="the python package playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path: install the distribution's package"),
]

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
VERDICTS = ("repaired", "no_evidence_of_loss", "no_admissible_repair", "repair_not_verified")


def sample():
    """Load the sample runs of the unit tests; a plugin would make them fixtures of every test."""
    path = Path(__file__).parents[1] / "unit" / "report" / "conftest.py"
    spec = importlib.util.spec_from_file_location("report_samples", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Write one page for each verdict, one audit, and one of a run with long paths; return their addresses."""
    made, folder = sample(), tmp_path_factory.mktemp("pages")
    rows, spec = made.make_records(), made.make_run()
    texts = {verdict: render_heal(spec, made.SUMMARIES[verdict](), rows) for verdict in VERDICTS}
    texts["audit"] = render_audit({**spec, "command": "audit"}, made.make_audit_summary(), [])
    texts["paths"] = render_heal(*made.with_paths(spec, made.SUMMARIES["repaired"]()), rows)
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: (folder / f"{name}.html").as_uri() for name in texts}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield started
        started.close()


@pytest.fixture
def visit(browser, pages):
    """Open a page in a fresh profile; afterwards nothing may have been complained about or asked of the network."""
    contexts, complaints, requests = [], [], []

    def go(name="repaired", *, width=1280, scheme="light", scripts=True):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=scripts
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(pages[name])
        return page

    yield go
    for context in contexts:
        context.close()
    assert complaints == []
    assert set(requests) <= {*pages.values(), "data:,"}
    assert requests


def background(page):
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def brightness(colour):
    return sum(int(one) for one in re.findall(r"\d+", colour)[:3])


@pytest.mark.parametrize("name", [*VERDICTS, "audit", "paths"])
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_no_page_is_wider_than_its_window(visit, name, width):
    page = visit(name, width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    clipped = """[...document.querySelectorAll('main *')].filter(one => {
        const box = one.getBoundingClientRect();
        return box.width && box.right > innerWidth + 1 && !one.closest('.scroll');
    }).map(one => one.outerHTML.slice(0, 80))"""
    assert page.evaluate(clipped) == []


def test_the_page_follows_the_systems_theme(visit):
    light, dark = (background(visit(scheme=scheme)) for scheme in ("light", "dark"))
    assert brightness(light) > 600
    assert brightness(dark) < 150


def test_the_theme_is_toggled_by_keyboard_and_kept_nowhere(visit):
    page = visit()
    before = background(page)
    page.locator("#theme").focus()
    page.keyboard.press("Enter")
    assert brightness(background(page)) < 150 < brightness(before)
    assert page.locator("#theme").get_attribute("aria-pressed") == "true"
    page.keyboard.press("Space")
    assert background(page) == before
    page.keyboard.press("Space")
    assert page.evaluate("document.cookie") == ""
    page.reload()
    assert background(page) == before


def test_a_folded_answer_opens_and_closes_by_keyboard(visit):
    page = visit()
    fold = page.locator("details.fold").first
    assert not fold.locator(".text").is_visible()
    fold.locator("summary").focus()
    page.keyboard.press("Enter")
    assert fold.locator(".text").is_visible()
    page.keyboard.press("Space")
    assert not fold.locator(".text").is_visible()


def test_all_folded_answers_open_and_close_at_once(visit):
    page = visit()
    count = page.locator("details.fold").count()
    page.get_by_role("button", name="Open all folded answers").press("Enter")
    assert page.locator("details.fold[open]").count() == count > 0
    page.get_by_role("button", name="Close all").press("Enter")
    assert page.locator("details.fold[open]").count() == 0


def test_the_first_tab_stop_skips_to_the_verdict(visit):
    page = visit()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"


def test_what_has_the_focus_is_outlined(visit):
    page = visit()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_the_command_is_copied_or_selected(visit):
    page = visit()
    page.locator("#copy").press("Enter")
    page.wait_for_function("document.getElementById('copied').textContent !== ''")
    assert page.locator("#copied").inner_text() in ("Copied", "Selected: copy it with the keyboard")


def test_every_picture_has_a_name_and_every_table_a_caption(visit):
    page = visit()
    unnamed = """[...document.querySelectorAll('svg, img')].filter(one =>
        one.getAttribute('aria-hidden') !== 'true' &&
        !document.getElementById(one.getAttribute('aria-labelledby'))?.textContent).length"""
    assert page.evaluate(unnamed) == 0
    assert page.locator("svg[role=img]").count() >= 6
    assert page.locator("table").count() == page.locator("table > caption").count() > 0
    assert page.locator("th:not([scope])").count() == 0


def test_examples_are_rows_on_a_wide_page_and_stacks_on_a_narrow_one(visit):
    for width, is_row in ((1280, True), (360, False)):
        page = visit(width=width)
        prompt = page.locator(".example header").first.bounding_box()
        answers = [one.bounding_box() for one in page.locator(".example").first.locator(".answer").all()]
        assert len(answers) == 3
        assert all((one["x"] >= prompt["x"] + prompt["width"] - 1) is is_row for one in answers)
        assert (len({one["y"] for one in answers}) == 1) is is_row


def test_landmarks_and_headings_are_in_order(visit):
    page = visit()
    for role in ("banner", "navigation", "main", "contentinfo"):
        assert page.get_by_role(role).count() == 1, role
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(one => Number(one.tagName[1]))")
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


CONTRAST = """() => {
    const canvas = Object.assign(document.createElement('canvas'), {width: 1, height: 1});
    const paint = canvas.getContext('2d', {willReadFrequently: true});
    const channels = colour => {
        paint.clearRect(0, 0, 1, 1); paint.fillStyle = colour; paint.fillRect(0, 0, 1, 1);
        return [...paint.getImageData(0, 0, 1, 1).data];
    };
    const light = colour => channels(colour).slice(0, 3)
        .map(one => one / 255).map(one => one <= .04045 ? one / 12.92 : ((one + .055) / 1.055) ** 2.4)
        .reduce((sum, one, index) => sum + one * [.2126, .7152, .0722][index], 0);
    const behind = one => {
        for (let at = one; at; at = at.parentElement) {
            const colour = getComputedStyle(at).backgroundColor;
            if (channels(colour)[3] === 255) return colour;
        }
    };
    const poor = [];
    for (const one of document.querySelectorAll('body *')) {
        const own = [...one.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
        if (!own || !one.checkVisibility() || ['title', 'desc', 'SCRIPT'].includes(one.tagName)) continue;
        const style = getComputedStyle(one);
        const isLetter = one.classList.contains('letter');
        const ground = isLetter ? getComputedStyle(one.previousElementSibling).fill : behind(one);
        const [a, b] = [light(one.closest('svg') ? style.fill : style.color), light(ground)].sort((x, y) => y - x);
        const ratio = (a + .05) / (b + .05);
        if (ratio < 4.5) poor.push([one.tagName, one.className.baseVal ?? one.className, ratio.toFixed(2)].join(' '));
    }
    return [...new Set(poor)];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["repaired", "repair_not_verified"])
def test_text_stands_out_from_its_ground(visit, name, scheme):
    assert visit(name, scheme=scheme).evaluate(CONTRAST) == []


def test_one_drawing_of_each_figure_is_shown(visit):
    for width, shown, hidden in ((1280, "wide", "narrow"), (360, "narrow", "wide")):
        page = visit(width=width)
        assert page.locator(f"#curve-{shown}").is_visible()
        assert not page.locator(f"#curve-{hidden}").is_visible()


def test_the_printed_page_is_light_and_opens_tables_but_no_harmful_answer(visit):
    page = visit(scheme="dark")
    page.emulate_media(media="print")
    assert background(page) == "rgb(255, 255, 255)"
    assert page.locator("#verdict").is_visible()
    assert page.locator("#curve-wide").is_visible()
    assert not page.locator("#theme").is_visible()
    assert page.locator("#config-table tbody tr").first.bounding_box()["height"] > 0
    assert not page.locator("details.fold .text").first.is_visible()


def test_printing_makes_a_document_with_the_verdict_as_its_heading(visit):
    page = visit(scheme="dark")
    printed = page.pdf(format="A4", tagged=True, outline=True)
    assert printed.startswith(b"%PDF-")
    assert 4 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 30
    # Chromium drops the space at each line break of a heading from the document's outline.
    verdict = page.locator("#verdict").inner_text().replace(" ", "")
    titles = [one.replace(b" ", b"") for one in re.findall(rb"/Title\s*\(([^)]*)\)", printed)]
    assert verdict.encode() in titles
    assert page.locator("details[open]").count() == 0


def test_without_scripts_everything_can_still_be_read(visit):
    page = visit(scripts=False)
    assert page.locator("#verdict").is_visible()
    assert not page.locator("#theme").is_visible()
    fold = page.locator("details.fold").first
    fold.locator("summary").press("Enter")
    assert fold.locator(".text").is_visible()
