"""What makes a whole build fail, found at once: works cited but not listed, works listed twice, labels on two pages."""

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


def test_no_label_stands_on_two_pages():
    labels = []
    for page in [*(ROOT / "notebooks").glob("*.py"), *(ROOT / "book").glob("*.md")]:
        labels += re.findall(r"(?m)^(?:# )?\(([\w-]+)\)=$", page.read_text(encoding="utf-8"))
    assert labels and len(labels) == len(set(labels)), f"twice: {sorted({x for x in labels if labels.count(x) > 1})}"
