# SPDX-License-Identifier: Apache-2.0
"""The report in the distribution's Chromium, opened from the disk with nothing but the file itself."""

import importlib.util
import itertools
import re
import shutil
from pathlib import Path

import pytest

from keelwright.report.page import render_audit, render_compare, render_gate, render_heal

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


AREAS = tuple(f"area_{index}_of_a_village{'_with_a_long_name' * (index % 4 == 0)}" for index in range(40))


def audit_pages(made, spec):
    """An audit of two models over forty areas, one of two thousand items, a comparison and a gate."""
    summary = made.make_rich_summary(AREAS)
    sides = made.make_rich_records(AREAS, models=("before", "after"))
    return {
        "rich": render_audit(spec, summary, made.make_rich_records(AREAS)),
        "many": render_audit(spec, summary, made.make_rich_records(AREAS, each=60)),
        "compare": render_compare(spec, {**summary, "command": "compare", "runs": ["a", "b"]}, sides),
        "gate": render_gate(spec, made.make_gate_summary()),
    }


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Write one page for each verdict, one audit, and one of a run with long paths; return their addresses."""
    made, folder = sample(), tmp_path_factory.mktemp("pages")
    rows, spec = made.make_records(), made.make_run()
    texts = {verdict: render_heal(spec, made.SUMMARIES[verdict](), rows) for verdict in VERDICTS}
    texts["audit"] = render_audit({**spec, "command": "audit"}, made.make_audit_summary(), [])
    texts |= audit_pages(made, {**spec, "command": "audit"})
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


@pytest.mark.parametrize("name", [*VERDICTS, "audit", "paths", "rich", "compare", "gate"])
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
@pytest.mark.parametrize("name", ["repaired", "repair_not_verified", "rich", "gate"])
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


def shown(page):
    return page.locator(".entry:visible")


def test_answers_are_searched_and_filtered_together(visit):
    page = visit("rich")
    total = page.locator(".entry").count()
    assert shown(page).count() == min(50, total)
    page.get_by_label("Search prompts and answers").fill("villager")
    playwright.expect(page.locator("#found")).to_have_text(re.compile("^6 of"))
    assert shown(page).count() == 6
    page.get_by_label("Verdict on any answer").select_option("answered")
    assert page.locator("#found").inner_text() == f"2 of {total} items"
    page.get_by_role("button", name="Clear filters").press("Enter")
    assert page.locator("#found").inner_text().startswith(f"{total} of {total} items")
    assert page.evaluate("document.activeElement.id") == "filter-text"


def test_items_that_flipped_and_items_in_dispute_can_be_had_alone(visit):
    page = visit("rich")
    page.get_by_label("Change", exact=True).select_option("*")
    every = page.locator(".entry[data-turns]").count()
    assert page.locator("#found").inner_text().startswith(f"{every} of")
    page.get_by_label("Judges disagree").check()
    both = page.locator(".entry[data-turns][data-differs]").count()
    assert page.locator("#found").inner_text().startswith(f"{both} of")
    assert 0 < both < every
    assert shown(page).count() == both


def test_the_rest_of_a_turn_is_one_click_away(visit):
    page = visit("rich")
    page.locator("a[data-turn='refusal_rate:worse']").click()
    assert page.get_by_label("Change", exact=True).input_value() == "refusal_rate:worse"
    turned = page.locator(".entry[data-turns*='refusal_rate:worse']").count()
    assert page.locator("#found").inner_text().startswith(f"{turned} of")


def test_a_wrong_pair_leads_to_its_answers_whatever_is_filtered(visit):
    page = visit("rich")
    page.get_by_label("Search prompts and answers").fill("nothing has these words")
    playwright.expect(page.locator("#found")).to_have_text(re.compile("^0 of"))
    page.locator("#pairs details.data summary").first.click()
    link = page.locator("#pairs-0-wrong-table a").first
    target = link.get_attribute("href")
    link.click()
    assert page.locator(target).evaluate("one => one.open")
    assert page.locator(f"{target} .answers").is_visible()


def test_the_browser_of_answers_is_used_by_keyboard(visit):
    page = visit("rich")
    page.locator("#more").press("Enter")
    assert page.evaluate("document.activeElement.closest('.entry').id") == "item-51"
    assert shown(page).count() == min(100, page.locator(".entry").count())
    page.keyboard.press("Enter")
    assert page.locator("#item-51 .answers").is_visible()
    page.get_by_role("button", name="Open these").press("Enter")
    assert page.locator(".entry[open]").count() == shown(page).count()
    page.get_by_role("button", name="Close these").press("Enter")
    assert page.locator(".entry[open]").count() == 0


def test_an_open_item_keeps_its_harmful_answer_folded(visit):
    page = visit("rich")
    page.get_by_label("Change", exact=True).select_option("refusal_rate:worse")
    first = shown(page).first
    first.locator("summary").first.press("Enter")
    fold = first.locator("details.fold")
    assert fold.count() == 1
    assert not fold.locator(".text").is_visible()
    page.get_by_role("button", name="Open all folded answers").press("Enter")
    assert not fold.locator(".text").is_visible()


def test_thousands_of_items_are_filtered_at_once(visit):
    page = visit("many")
    assert page.locator(".entry").count() > 1000
    assert shown(page).count() == 50
    took = page.evaluate("""async () => {
        const start = performance.now();
        const field = document.getElementById('filter-turns');
        field.value = '*';
        field.dispatchEvent(new Event('change'));
        await new Promise(done => requestAnimationFrame(() => setTimeout(done)));
        return performance.now() - start;
    }""")
    assert took < 1500


def test_without_scripts_every_answer_can_still_be_opened(visit):
    page = visit("rich", scripts=False)
    assert not page.locator(".filters").is_visible()
    assert not page.locator("#open-shown").is_visible()
    page.locator("#all-answers > summary").press("Enter")
    assert shown(page).count() == page.locator(".entry").count()
    last = page.locator(".entry").last
    last.locator("summary").first.press("Enter")
    assert last.locator(".answers").is_visible()


def test_the_list_of_all_answers_is_not_printed(visit):
    page = visit("rich")
    page.emulate_media(media="print")
    assert not page.locator("#browser").is_visible()
    assert page.locator(".print-note").is_visible()


def test_every_filter_has_a_label(visit):
    page = visit("rich")
    unnamed = (
        "[...document.querySelectorAll('#browser input, #browser select')].filter(one => !one.labels.length).length"
    )
    assert page.evaluate(unnamed) == 0
    assert page.get_by_role("search").count() == 1
