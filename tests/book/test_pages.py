"""Every page of the table of contents exists as HTML, whole, and opens in a browser without a fault."""

import os
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text())
PAGES = [TOC["root"], *(c["file"] for part in TOC["parts"] for c in part["chapters"])]
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
FOUNDATIONS = ("01_clip", "02_attacks", "03_sound_evaluation", "10_small_clip")  # they reproduce no paper's claims


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
    if 'class="math' in html(site, name):
        page.wait_for_selector("mjx-container", state="attached", timeout=20_000)
        assert page.locator("mjx-merror").count() == 0, "a formula that MathJax could not read"
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
