"""The page in a real browser: it opens in silence, asks for nothing, filters, and can be read without scripts and on a telephone.

Chromium comes from the system (``/usr/bin/chromium``, or EVALKIT_CHROMIUM), playwright from the ``dev`` extra. Without them these
tests are skipped, unless EVALKIT_REQUIRE_BROWSER=1: then that is a failure.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from page_case import ANCHOR, LATE, PARENT_ANCHOR, write_case

from evalkit.report.page.write import write_page
from evalkit.store.reader import open_results

CHROMIUM = os.environ.get("EVALKIT_CHROMIUM", "/usr/bin/chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 400, "height": 800}
FEATURES = "details.feature"
LEAST_CONTRAST = """() => {
  // relative luminance and contrast as WCAG 2 defines them
  const linear = value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const parts = colour => colour.match(/[0-9.]+/g).map(Number);
  const light = colour => {
    const [red, green, blue] = colour.slice(0, 3).map(value => linear(value / 255));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const sheet = parts(getComputedStyle(document.body).backgroundColor);
  const texts = document.querySelectorAll("p, td, th, dt, dd, li, caption, summary, figcaption, h1, h2, h3, h4, a, mark");
  return Array.from(texts).reduce((least, one) => {
    const ink = light(parts(getComputedStyle(one).color));
    const [alpha, ...shade] = parts(getComputedStyle(one).backgroundColor).reverse();
    const under = one.tagName === "MARK" ? sheet.map((value, i) => value + alpha * (shade[2 - i] - value)) : sheet;
    const paper = light(under);
    return Math.min(least, (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05));
  }, 21);
}"""


def missing(what: str) -> None:
    reason = f"no browser to test in: {what}"
    if os.environ.get("EVALKIT_REQUIRE_BROWSER") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def chromium():
    if not Path(CHROMIUM).exists():
        missing(f"{CHROMIUM} is not there")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    with open_results(write_case(tmp_path_factory.mktemp("browser"))) as store:
        return write_page(store)


@pytest.fixture
def opened(chromium, path):
    """Opens the page; what it said on the console and what it asked for stand beside it. Both are checked in the end."""
    contexts, said, asked = [], [], []

    def opens(anchor="", **settings):
        context = chromium.new_context(**{"viewport": WIDE, **settings})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{path.as_uri()}{anchor}", wait_until="load")
        return page

    yield opens
    for context in contexts:
        context.close()
    assert said == []
    assert {url.partition("#")[0] for url in asked} == {path.as_uri()}


def shown(page):
    """Numbers of the features that are shown, in order."""
    return [page.locator(FEATURES).nth(i).locator("h3").inner_text().split()[0] for i in visible(page)]


def visible(page):
    return [i for i in range(page.locator(FEATURES).count()) if page.locator(FEATURES).nth(i).is_visible()]


def test_it_opens_in_silence_and_asks_for_nothing(opened):
    page = opened()
    assert page.title() == "cases: run cases-1"
    assert page.locator("h1").inner_text().startswith("cases") and page.locator(FEATURES).count() == 3
    page.locator("#open").click()
    assert page.locator(f"{FEATURES}[open]").count() == 3


def test_an_address_that_leads_nowhere_leaves_the_page_whole(opened):
    for anchor in ("#100%", "#no-such-feature"):
        assert opened(anchor).get_by_label("Show features with").is_visible()


def test_the_filter_hides_and_shows_features(opened):
    page = opened()
    words, count = page.get_by_label("Show features with"), page.locator("#count")
    assert shown(page) == ["3", "5", "21"] and count.inner_text() == "3 of 3 shown"
    for typed, found in (
        ("5", ["5"]),
        ("closes </details>", ["3"]),
        ("DAVE", ["3"]),
        ("blocks.2", ["21"]),
        ("<script>", ["3", "5", "21"]),
    ):
        words.fill(typed)
        assert shown(page) == found, typed
    words.fill("nothing like it")
    assert shown(page) == [] and count.inner_text() == "0 of 3 shown"
    words.fill("")
    page.get_by_label("all sides agree").check()
    assert shown(page) == ["3"]


def test_the_keyboard_is_enough(opened):
    page = opened()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    summary = page.locator(f"{FEATURES} > summary").nth(1)
    summary.focus()
    page.keyboard.press("Enter")
    assert page.locator(FEATURES).nth(1).get_attribute("open") is not None


@pytest.mark.parametrize("script", [True, False])
def test_a_node_of_a_tree_leads_to_its_feature(opened, script):
    page = opened(java_script_enabled=script)
    tree = page.locator(f"[id='{ANCHOR}'] .tree svg")
    assert tree.is_visible() and tree.locator("rect").count() == 4
    target = page.locator(f"[id='{PARENT_ANCHOR}']")
    assert not target.is_visible()
    tree.locator("a").click()
    target.wait_for(state="visible")
    assert page.url.endswith(f"#{PARENT_ANCHOR}")
    assert opened(f"#{PARENT_ANCHOR}", java_script_enabled=script).locator(f"[id='{PARENT_ANCHOR}']").is_visible()


def test_everything_can_be_read_without_scripts(opened):
    page = opened(java_script_enabled=False)
    assert not page.locator("#filter").is_visible(), "a filter that would do nothing is not offered"
    assert visible(page) == [0, 1, 2]
    for summary in page.locator("summary").all():
        if summary.locator("xpath=..").get_attribute("open") is None:
            summary.click()
    body = page.locator(f"[id='{ANCHOR}']")
    assert all(table.is_visible() for table in body.locator("table").all())
    said = body.inner_text()
    assert "closes </details></svg><style>" in said and "<script>alert('x')</script>" in said and "Dave Dave </mark>" in said


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_nothing_overflows_or_fades(opened, size, scheme):
    page = opened(viewport=size, color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    contrast = page.evaluate(LEAST_CONTRAST)
    assert contrast >= 4.5
    for svg in page.locator("svg:visible").all():
        box = svg.bounding_box()
        assert box["width"] > 20 and 5 < box["height"] < 4000


def test_printed_sections_are_open(opened):
    page = opened(java_script_enabled=False)
    inner = page.locator(FEATURES).nth(1).locator("table").first
    assert not inner.is_visible()
    page.emulate_media(media="print")
    assert inner.is_visible() and not page.locator("nav").is_visible()


def test_the_section_says_where_it_is(opened):
    assert LATE in opened().locator(FEATURES).first.locator("h3").inner_text()
