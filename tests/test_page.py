"""The page in a real browser: what is seen of it, and that nothing in it runs or asks for anything."""

import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from test_report import FIGURES, fill_folder, make_full_report, make_hostile_report

from embedistill.report.rendering import write_page

NAMES = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"]
CONTRAST = """() => {
  const channels = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const light = colour => channels(colour)
    .map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const paper = light(getComputedStyle(document.body).backgroundColor);
  const ratio = colour => (Math.max(light(colour), paper) + 0.05) / (Math.min(light(colour), paper) + 0.05);
  const texts = [...document.querySelectorAll("h1,h2,h3,p,li,a,summary,th,td,caption,figcaption,svg text")];
  return Math.min(...texts.map(e => ratio(getComputedStyle(e)[e.tagName === "text" ? "fill" : "color"])));
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'embedistill[dev]'")
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_page(make_full_report(), fill_folder(tmp_path_factory.mktemp("run"))).as_uri()


@pytest.fixture
def show(browser: Any) -> Iterator[Any]:
    """Opens a page, and says when all is over what it complained of and asked for."""
    contexts = []
    complaints: list[str] = []

    def open_page(address: str, **options: Any) -> Any:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: complaints.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: request.url in {address, "data:,"} or complaints.append(request.url))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def test_markup_in_texts_is_inert(show: Any, tmp_path: Path) -> None:
    page = show(write_page(make_hostile_report(), fill_folder(tmp_path)).as_uri())
    page.wait_for_timeout(200)
    assert page.title().startswith("run <script>")
    assert page.evaluate("document.querySelectorAll('script, img, iframe').length") == 0


def test_every_figure_is_seen_and_named(show: Any, address: str) -> None:
    page = show(address)
    boxes = {figure: page.locator(f"#{figure} svg").bounding_box() for figure in FIGURES}
    assert all(box and box["width"] > 200 and box["height"] > 100 for box in boxes.values())
    assert page.get_by_role("img").count() == len(FIGURES)
    assert (
        page.get_by_role("img", name="Models by texts a second and mean retention: teacher 30.5, 100.0 %").count() == 1
    )


def test_a_screen_reader_finds_its_way(show: Any, address: str) -> None:
    page = show(address)
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(e => Number(e.tagName[1]))")
    assert levels[0] == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))
    assert page.evaluate("[...document.querySelectorAll('th')].every(e => e.scope && e.textContent.trim())")
    assert page.evaluate("[...document.querySelectorAll('table')].every(e => e.caption && e.tHead)")
    assert page.get_by_role("main").count() == page.get_by_role("navigation", name="Sections").count() == 1
    links = page.evaluate("[...document.querySelectorAll('a')].map(e => e.hash.slice(1))")
    assert all(page.locator(f"#{anchor}").count() == 1 for anchor in links)


def test_a_keyboard_reaches_what_scrolls_and_folds(show: Any, address: str) -> None:
    page = show(address, viewport={"width": 390, "height": 844})
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    larger = "e.scrollWidth > e.clientWidth || e.scrollHeight > e.clientHeight"
    wide = f"[...document.querySelectorAll('.scroll, pre, blockquote')].filter(e => {larger})"
    assert page.evaluate(f"{wide}.length") > 3
    assert page.evaluate(f"{wide}.every(e => e.tabIndex === 0 && e.ariaLabel)")
    page.locator("summary").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("details").first.evaluate("e => e.open")


@pytest.mark.parametrize("width", [390, 320])
def test_it_fits_a_phone(show: Any, address: str, width: int) -> None:
    page = show(address, viewport={"width": width, "height": 844}, is_mobile=True)
    page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert page.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth]") == [width, width]
    sizes = "[...document.querySelectorAll('svg text')].map(e => e.getBoundingClientRect().height)"
    assert page.evaluate(f"Math.min(...{sizes})") > 9 * width / 390


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_by_day_and_by_night(show: Any, address: str, scheme: str) -> None:
    page = show(address, color_scheme=scheme)
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(16, 20, 25)"}[scheme]
    assert page.evaluate(CONTRAST) >= 4.5


def test_paper_is_white_and_shows_what_is_folded(show: Any, address: str) -> None:
    page = show(address, color_scheme="dark")
    hidden = page.locator("details table").first
    assert hidden.evaluate("e => e.checkVisibility({contentVisibilityAuto: true})") is False
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    shown = "[...document.querySelectorAll('details table')].every(e => e.checkVisibility() && e.offsetHeight > 20)"
    assert page.evaluate(shown)
    assert page.evaluate(CONTRAST) >= 4.5
    assert page.pdf(format="A4").startswith(b"%PDF")
