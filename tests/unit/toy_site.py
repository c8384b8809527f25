"""A local server that truncates, corrupts, stalls and answers web pages, as `site.plan` says."""

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from robustvlm_lite.data import download

CONTENT = bytes(range(256)) * 4000  # about a megabyte


class Handler(BaseHTTPRequestHandler):
    """Serves `site.files`; the next word of `site.plan` says how this request goes wrong."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        site = self.server.site
        site.asked.append(self.headers.get("Range"))
        how = site.plan.pop(0) if site.plan else "well"
        content, start, status = site.files.get(self.path), 0, 200
        if content is None or how.isdigit():
            return self.send_error(int(how) if how.isdigit() else 404)
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        same = self.headers.get("If-Range", site.etag) == site.etag
        if asked and same and how != "ignore range":
            start, status = int(asked[1]), 206
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
        body = content[start:]
        if how == "corrupt":
            body = body[:-1] + bytes([body[-1] ^ 1])
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=utf-8" if how == "page" else "application/octet-stream")
        self.send_header("Content-Length", str(len(body)))
        if status == 206:
            shown = start + 1 if how == "shift" else start
            self.send_header("Content-Range", f"bytes {shown}-{len(content) - 1}/{len(content)}")
        if site.etag:
            self.send_header("ETag", site.etag)
        self.end_headers()
        self.close_connection = True
        if how == "nothing":
            return None
        self.wfile.write(body[: len(body) // 2] if how in ("truncate", "stall") else body)
        if how == "stall":
            self.wfile.flush()
            site.released.wait(10)

    def log_message(self, *args):
        pass


@pytest.fixture
def site(monkeypatch):
    """A server: .url, .files {path: bytes}, .plan of mishaps, .asked ranges."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *args: None  # a client that went away is part of the game
    server.site = SimpleNamespace(
        url=f"http://127.0.0.1:{server.server_port}",
        files={"/a.bin": CONTENT},
        plan=[],
        asked=[],
        etag='"1"',
        released=threading.Event(),
    )
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setattr(download, "TIMEOUT_S", 0.3)
    monkeypatch.setattr(download, "WAIT_S", 0.01)
    yield server.site
    server.site.released.set()
    server.shutdown()
    server.server_close()
