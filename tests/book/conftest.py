"""The book, built once from nothing, served on this machine, and a browser to open it."""

import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from robustvlm_lite.doctor import BROWSERS

ROOT = Path(__file__).resolve().parents[2]
REQUIRED = os.environ.get("ROBUSTVLM_REQUIRE_BROWSER") == "1"
INSTALL = "apt-get install -y chromium"
CHROMIUM_FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()


@pytest.fixture(scope="session")
def site(tmp_path_factory, few) -> Path:
    """Folder of the HTML: ROBUSTVLM_SITE, or built here with warnings as errors, in a fresh folder, because an old one can
    hide a warning. Here the chapters run on few images; `make book` executes them whole."""
    if built := os.environ.get("ROBUSTVLM_SITE"):
        return (ROOT / built).resolve()
    if not any((ROOT / "notebooks").glob("[0-9]*.py")):
        pytest.skip("no chapter under notebooks/ yet")
    source, out = tmp_path_factory.mktemp("source") / "book", tmp_path_factory.mktemp("site")
    left_out = (".git", ".venv*", "_build", "runs", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*left_out))
    for page in (source / "notebooks").glob("[0-9]*.py"):
        text = page.read_text(encoding="utf-8")
        for name, value in few.items():
            text = re.sub(rf"^{name}: int = 0\b", f"{name}: int = {value}", text, flags=re.M)
        page.write_text(text, encoding="utf-8")
    jupyter_book = Path(sys.executable).with_name("jupyter-book")
    command = [jupyter_book, "build", source, "--path-output", out, "-W", "-n", "--keep-going"]
    build = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    if build.returncode:
        reports = [p.read_text() for p in out.rglob("reports/**/*.err.log")]
        pytest.fail(
            "\n".join(
                [f"jupyter-book ended with {build.returncode}", build.stdout[-4000:], build.stderr[-4000:], *reports]
            )
        )
    return out / "_build" / "html"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        """Requests are checked in the browser; nothing to print."""


@pytest.fixture(scope="session")
def address(site):
    """http://127.0.0.1:port of the built book."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def browser(site):
    """The system's Chromium under Playwright. It comes after `site`, so that no browser idles while the book builds."""
    chromium = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not chromium:
        message = f"no chromium on this machine; install it with: {INSTALL}"
        pytest.fail(message) if REQUIRED else pytest.skip(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()
