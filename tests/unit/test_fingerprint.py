"""A card is stale when something moved that its chapter's code reaches, and at no other time."""

import pytest

from robustvlm_lite import fingerprint

# Every line that a chapter reaches says "reached"; none of the others does.
FILES = {
    "notebooks/04_x.py": """
from robustvlm_lite import plots, room, shown
from robustvlm_lite.deep import handed
import robustvlm_lite.deep.part as part
y = room.public("reached")
part.f(handed)
shown.TABLE["reached"]
plots.bars("reached")
""",
    "robustvlm_lite/__init__.py": "",
    "robustvlm_lite/room/__init__.py": "from .public import public\nfrom . import aside\ndef unread(): 0\n",
    "robustvlm_lite/room/public.py": """
from ..base import Base
LIMIT = "reached"
def helper(): return aside
def unread(): return LIMIT
class Made(Base):
    "documented"
    kind = "reached"
    def method(self):
        from ..lazily import g
        # a remark
        return g.of("reached")
def public(x):
    \"\"\"Says

    what it does.
    \"\"\"
    return Made(), LIMIT
print("reached")
""",
    "robustvlm_lite/room/aside.py": "x = 0\n",
    "robustvlm_lite/base.py": "class Base: a = 'reached'\nclass Other: a = 0\n",
    "robustvlm_lite/lazily.py": "g = {'reached': 1}\ng['more'] = 'reached'\nh = 0\n",
    "robustvlm_lite/shown.py": "import numpy\nfrom .deep import leaf\nTABLE: dict = {'reached': leaf.one}\n",
    "robustvlm_lite/deep/__init__.py": "\"a room, 0\"\nunread = 0\n",
    "robustvlm_lite/deep/leaf.py": "@decorated('reached')\ndef one(): return 'reached'\ndef two(): 0\ndef decorated(x): return 'reached'\n",
    "robustvlm_lite/deep/handed.py": "def a(): return 'reached'\nb = 'reached'\n",
    "robustvlm_lite/deep/part.py": "def f(x):\n    one = 'reached'\n    return one\ndef two(): 0\n",
    "robustvlm_lite/plots/__init__.py": "from .chart import bars\n",
    "robustvlm_lite/plots/chart.py": "def bars(): return 0\n",
    "robustvlm_lite/elsewhere.py": "from . import room\n",
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    sizes = {page: {"profiles": {name: {"n": 1, "minutes": 3} for name in ("tiny", "small")}} for page in ("04_x", "05_y")}
    monkeypatch.setattr(fingerprint, "PACKAGE", tmp_path / "robustvlm_lite")
    monkeypatch.setattr(fingerprint, "chapters", lambda: sizes)
    return tmp_path, sizes


def written(path, lines):
    path.write_text("\n".join(lines) + "\n")
    return fingerprint.code_sha256("04_x", "tiny")


def test_the_hash_moves_with_each_line_that_a_chapter_reaches_and_with_no_other(place):
    """Line by line over every file: only a line that is reached moves the hash, and each of them does."""
    folder, _ = place
    before = fingerprint.code_sha256("04_x", "tiny")
    for name, text in FILES.items():
        lines = text.splitlines()
        for k, line in enumerate(lines):
            if line.strip() and not line.startswith(("from ", "import ")) and "from ." not in line:
                changed = lines[:k] + [line.replace("reached", "changed").replace("0", "1")] + lines[k + 1 :]
                assert (written(folder / name, changed) != before) == ("reached" in line), (name, line)
        assert written(folder / name, lines) == before


@pytest.mark.parametrize(
    ("name", "old", "new", "counts"),
    [
        ("notebooks/04_x.py", "y = ", "# a sentence of the page\n\ny = ", False),
        ("notebooks/04_x.py", "room.public(", "room.unread(", True),
        ("robustvlm_lite/room/public.py", "Says\n", "Tells\n", False),
        ("robustvlm_lite/room/public.py", "documented", "told", False),
        ("robustvlm_lite/room/public.py", "# a remark", "# another", False),
        ("robustvlm_lite/room/public.py", "return Made()", "return helper()", True),
        ("robustvlm_lite/room/public.py", "LIMIT\nprint", "unread()\nprint", True),
        ("robustvlm_lite/room/__init__.py", "def unread", "def further(): 0\ndef unread", False),
        ("robustvlm_lite/deep/handed.py", "b = ", "c = 2\nb = ", True),
        ("robustvlm_lite/lazily.py", "h = 0", "h = 0\ng |= {2: 2}", True),
    ],
)
def test_what_counts(place, name, old, new, counts):
    folder, _ = place
    before = fingerprint.code_sha256("04_x", "tiny")
    assert old in FILES[name]
    (folder / name).write_text(FILES[name].replace(old, new))
    assert (fingerprint.code_sha256("04_x", "tiny") != before) == counts


def test_a_name_that_is_made_at_run_time_reaches_its_whole_module(place):
    folder, _ = place
    (folder / "notebooks/04_x.py").write_text("from robustvlm_lite import lazily\nlazily.unknown\n")
    before = fingerprint.code_sha256("04_x", "tiny")
    (folder / "robustvlm_lite/lazily.py").write_text(FILES["robustvlm_lite/lazily.py"].replace("h = 0", "h = 1"))
    assert fingerprint.code_sha256("04_x", "tiny") != before


def test_only_the_sizes_of_its_own_profile_count(place):
    _, sizes = place
    before = fingerprint.code_sha256("04_x", "tiny")
    for page, name, value, counts in (
        ("05_y", "tiny", {"n": 2}, False), ("04_x", "small", {"n": 2}, False),
        ("04_x", "tiny", {"minutes": 4}, False), ("04_x", "tiny", {"n": 2}, True),
    ):  # fmt: skip
        sizes[page]["profiles"][name] |= value
        assert (fingerprint.code_sha256("04_x", "tiny") != before) == counts


def test_without_a_chapter_all_of_the_package_counts(place, monkeypatch):
    folder, _ = place
    (folder / "profiles.yml").write_text("1")
    monkeypatch.setattr(fingerprint, "asset", lambda name: folder / name)
    seen = {fingerprint.code_sha256("")}
    for file in (folder / "robustvlm_lite/elsewhere.py", folder / "profiles.yml"):
        file.write_text("2")
        seen.add(fingerprint.code_sha256(""))
    assert len(seen) == 3 and fingerprint.code_sha256("evaluate") in seen
