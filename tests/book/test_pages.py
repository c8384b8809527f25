"""Every page of the table of contents exists as HTML, whole, and opens in a browser without a fault."""

import html.parser as html_parser
import json
import os
import re
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text())
PAGES = [TOC["root"], *(c["file"] for part in TOC["parts"] for c in part["chapters"])]
CARDS = [json.loads(path.read_text()) for path in sorted((ROOT / "book" / "cards").glob("*/card.json"))]
CHAPTERS = [page for page in PAGES if page.startswith("notebooks/")]
WIDTHS = (1280, 390)  # a laptop and a phone
VERDICT = re.compile(r"\b(reproduced|partly|not[_ ]reproduced|not[_ ]tested)\b")
SCREENSHOTS = os.environ.get("ROBUSTVLM_SCREENSHOTS")  # a folder: keep a picture of each page


def html(site: Path, page: str) -> str:
    return (site / f"{page}.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_page_exists(site, page):
    text = html(site, page)
    assert "<h1>" in text and "</html>" in text


CLAIMS = yaml.safe_load((ROOT / "book" / "claims.yml").read_text(encoding="utf-8"))
FOUNDATIONS = ("01_clip", "02_attacks", "03_sound_evaluation", "10_small_clip", "11_prompt_choices")  # they reproduce no paper's claims


@pytest.mark.parametrize("page", CHAPTERS)
def test_chapter_was_executed(site, page):
    """Its last cell prints the provenance of its numbers."""
    assert 'id="rvl-card"' in html(site, page)


@pytest.mark.parametrize("page", [page for page in CHAPTERS if Path(page).name not in FOUNDATIONS])
def test_chapter_holds_its_claims_table(site, page):
    """One table names every claim of the chapter and holds verdicts."""
    ids = [claim["id"] for claim in CLAIMS if claim["chapter"] == Path(page).name]
    tables = re.findall(r"<table.*?</table>", html(site, page), flags=re.S)
    whole = [table for table in tables if all(re.search(rf"\b{id}\b", table) for id in ids)]
    assert ids and any(VERDICT.search(table) for table in whole)


@pytest.mark.parametrize("page", CHAPTERS)
def test_chapter_opens_on_colab(site, page):
    assert re.search(
        rf"https://colab\.research\.google\.com/github/[\w.-]+/[\w.-]+/blob/main/{page}\.ipynb", html(site, page)
    )


@pytest.mark.parametrize("page", CHAPTERS)
def test_chapter_names_its_committed_cards_and_stands_in_the_gallery(site, page):
    chapter = Path(page).name
    line = re.search(r'<p class="rvl-cards">.*?</p>', html(site, page)).group()
    committed = sorted((ROOT / "book" / "cards").glob(f"{chapter}-*/card.json"))
    assert all(f"../book/cards/{path.parent.name}/card.json" in line for path in committed)
    tile = re.search(rf'<a class="rvl-tile" href="../notebooks/{chapter}.html"><img src="([^"]+)" alt="([^"]+)"', html(site, TOC["root"]))
    assert tile and (site / "book" / tile[1]).is_file() and len(tile[2]) > 15


def test_every_internal_link_holds(site):
    """Pages, pictures, cards and anchors; what leads to another host is not ours to promise."""
    targets = {path: Links.of(path) for path in site.rglob("*.html")}
    broken = []
    for page in [site / f"{name}.html" for name in PAGES]:
        for link in targets[page].links:
            address, _, anchor = link.partition("#")
            path = (page.parent / unquote(address.partition("?")[0])).resolve() if address else page
            if not path.is_file():
                broken.append(f"{page.name}: {link}")
            elif anchor and path in targets and "=" not in anchor and unquote(anchor) not in targets[path].anchors:
                broken.append(f"{page.name}: {link} has no such anchor")
    assert not broken, "\n".join(broken)


class Links(html_parser.HTMLParser):
    """What a page links without a host, and the anchors that it holds."""

    def __init__(self):
        super().__init__()
        self.links, self.anchors = set(), set()

    @classmethod
    def of(cls, path: Path) -> "Links":
        parser = cls()
        parser.feed(path.read_text(encoding="utf-8"))
        return parser

    def handle_starttag(self, tag, attrs):
        for name, text in attrs:
            if name in ("href", "src") and text and not re.match(r"\w+:|//", text):
                self.links.add(text)
            elif name in ("id", "name") and text:
                self.anchors.add(text)


def test_broken_links_are_seen(tmp_path):
    (tmp_path / "a.html").write_text('<p id="here"><a href="b.html#x">b</a><img src="data:x"><a href="https://x.org">x</a>')
    found = Links.of(tmp_path / "a.html")
    assert (found.links, found.anchors) == ({"b.html#x"}, {"here"})


def watched(browser, width: int, address: str):
    """A page of the browser, and the list that its faults go to."""
    page, faults = browser.new_page(viewport={"width": width, "height": 900}), []
    page.on("console", lambda m: faults.append(f"console: {m.text}") if m.type == "error" else None)
    page.on("pageerror", lambda e: faults.append(f"error: {e}"))
    page.on(
        "request",
        lambda r: None if r.url.startswith((address, "data:", "blob:")) else faults.append(f"off host: {r.url}"),
    )
    page.on("response", lambda r: faults.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
    return page, faults


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_page_in_a_browser(address, browser, site, name, width):
    page, faults = watched(browser, width, address)
    page.goto(f"{address}/{name}.html", wait_until="networkidle")
    require_formulas(page, html(site, name))
    for picture in page.locator(".bd-article img").all():
        picture.scroll_into_view_if_needed()
        alt = picture.get_attribute("alt") or ""
        assert len(alt) > 3 and not alt.endswith((".png", ".svg")), (
            f"no alternative text: {picture.get_attribute('src')[:60]}"
        )
        assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
    wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    if SCREENSHOTS:
        page.evaluate("window.scrollTo(0, 0)")
        page.screenshot(path=f"{SCREENSHOTS}/{name.replace('/', '_')}-{width}.png", full_page=True)
    page.close()
    assert not faults
    assert wide <= 0, f"{wide} px wider than the screen"


def require_formulas(page, text: str) -> None:
    if 'class="math' in text:
        page.wait_for_selector("mjx-container", state="attached", timeout=20_000)
        assert page.locator("mjx-merror").count() == 0, "a formula that MathJax could not read"


@pytest.mark.parametrize("name", PAGES)
def test_page_opened_as_a_file(browser, site, name):
    """Without a server everything works but the search, as the troubleshooting page says."""
    page, faults = watched(browser, 390, "file://")
    page.goto(f"file://{site}/{name}.html")
    require_formulas(page, html(site, name))
    page.close()
    assert not faults


def test_all_results_are_filtered_and_sorted(address, browser):
    page, faults = watched(browser, 1280, address)
    page.goto(f"{address}/book/results.html")
    visible = page.locator("#rvl-results tbody tr:visible")
    rows = sum(len(card["rows"]) for card in CARDS)
    assert visible.count() == rows and f"{rows} of {rows} rows" in page.locator(".rvl-filters output").inner_text()

    page.get_by_label("metric").select_option("clean_acc")
    clean = [row for card in CARDS for row in card["rows"] if row["metric"] == "clean_acc"]
    assert visible.count() == len(clean)
    assert page.locator("option[value=robust_acc]").is_enabled(), "a field does not rule out its own values"
    page.get_by_role("button", name="value (95 % interval)").click()
    shown = page.eval_on_selector_all("#rvl-results tbody tr:not([hidden]) td[data-value]", "c => c.map(x => +x.dataset.value)")
    assert shown == sorted(row["value"] for row in clean)
    page.get_by_role("button", name="value (95 % interval)").click()
    assert page.locator("th[aria-sort=descending]").count() == 1
    page.get_by_role("button", name="Show all").click()
    page.wait_for_function(f"document.querySelectorAll('#rvl-results tbody tr:not([hidden])').length === {rows}")

    chapter = CARDS[0]["chapter"]
    page.goto("about:blank")
    page.goto(f"{address}/book/results.html#chapter={chapter}")
    assert visible.count() == sum(len(card["rows"]) for card in CARDS if card["chapter"] == chapter)
    page.close()
    assert not faults


def test_all_results_read_without_javascript(address, browser):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{address}/book/results.html")
    assert page.locator("#rvl-results tbody tr:visible").count() == sum(len(card["rows"]) for card in CARDS)
    assert page.locator(".rvl-filters").count() == 0
    context.close()


def test_dark_mode_and_search(address, browser):
    page, faults = watched(browser, 1280, address)
    page.emulate_media(color_scheme="dark")
    page.goto(f"{address}/{PAGES[0]}.html", wait_until="networkidle")
    assert page.locator("html").get_attribute("data-theme") == "dark"
    page.goto(f"{address}/search.html?q=perturbation")
    page.wait_for_selector("#search-results li", timeout=20_000)
    page.close()
    assert not faults


def test_the_watch_sees_faults(address, browser):
    page, faults = watched(browser, 390, address)
    page.goto(f"{address}/{PAGES[0]}.html")
    page.evaluate("console.error('planted'); fetch('missing.html'); fetch('http://localhost:9/').catch(() => 0)")
    page.wait_for_timeout(500)
    page.close()
    seen = "\n".join(faults)
    assert "console: planted" in seen and "404: " in seen and "off host: http://localhost:9/" in seen
