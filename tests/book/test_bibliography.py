"""The bibliography holds every work that is cited, each once: one doubled entry makes the build lose them all."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_cited_work_is_there_once():
    keys = re.findall(r"(?m)^@\w+\{([^,]+),", (ROOT / "book" / "references.bib").read_text(encoding="utf-8"))
    assert len(keys) == len(set(keys)), f"twice: {sorted(k for k in set(keys) if keys.count(k) > 1)}"
    cited = set()
    for page in [*(ROOT / "notebooks").glob("*.py"), *(ROOT / "book").glob("*.md")]:
        for hit in re.findall(r"\{cite(?::\w)?\}`([^`]+)`", page.read_text(encoding="utf-8")):
            cited |= set(hit.split(","))
    assert cited and not (missing := cited - set(keys)), f"cited, but not in references.bib: {sorted(missing)}"
