"""What runs on the repository's host names only targets and files that exist, and `make book` knows when pages are out of date."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), flags=re.M))


def steps(workflow: Path) -> list[dict]:
    return [step for job in yaml.safe_load(workflow.read_text())["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda p: p.name)
def test_every_step_names_what_exists(workflow):
    for step in steps(workflow):
        assert ("run" in step) != ("uses" in step), step
        assert set(re.findall(r"\bmake ([\w-]+)", step.get("run", ""))) <= TARGETS
        assert not step.get("run", "").startswith(".") or (ROOT / step["run"]).is_file(), step
        assert "uses" not in step or re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]), step


def test_only_main_is_published_after_its_tests():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "book.yml").read_text())["jobs"]
    assert "refs/heads/main" in jobs["publish"]["if"] and jobs["publish"]["needs"] == "build"
    run = [step.get("run") or step["uses"] for step in jobs["build"]["steps"]]
    order = [run.index(wanted) for wanted in ("make setup", "make book", "make check", "actions/upload-artifact@v4")]
    assert order == sorted(order)


def test_the_template_asks_the_four_questions_of_contributing():
    asked = re.findall(r"^- (.+)\?$", (ROOT / ".github" / "PULL_REQUEST_TEMPLATE.md").read_text(), flags=re.M)
    told = " ".join((ROOT / "CONTRIBUTING.md").read_text().split())
    sentence = re.search(r"four questions of a change[^:]*: ([^?]+)\?", told).group(1)
    assert [q.lower() for q in asked] == [q.lower() for q in sentence.split(", ")]


# ---- the cache of executed pages

BOOK = """#!/bin/bash
mkdir -p _build/.jupyter_cache
[ -f _build/.jupyter_cache/executed ] && echo "from the cache" || echo "executed"
touch _build/.jupyter_cache/executed
"""


@pytest.fixture
def checkout(tmp_path):
    """A checkout in which building the book says whether the cache of executed pages was there."""
    if not shutil.which("make"):
        pytest.skip("no make on this machine")
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("robustvlm_lite/threat.py", "book/cards/x/card.json", "book/claims.yml", "requirements.lock", "book/index.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("first\n")
    command = tmp_path / ".venv" / "bin" / "jupyter-book"
    command.parent.mkdir(parents=True)
    command.write_text(BOOK)
    command.chmod(0o755)
    return tmp_path


def make_book(checkout: Path) -> str:
    run = subprocess.run(["make", "-s", "book"], cwd=checkout, capture_output=True, text=True, check=True)
    return run.stdout.strip()


def test_pages_are_executed_again_when_package_cards_claims_or_lock_changed(checkout):
    assert [make_book(checkout), make_book(checkout)] == ["executed", "from the cache"]
    for name in ("robustvlm_lite/threat.py", "book/cards/x/card.json", "book/claims.yml", "requirements.lock"):
        (checkout / name).write_text("second\n")
        assert [make_book(checkout), make_book(checkout)] == ["executed", "from the cache"], name
    (checkout / "book" / "index.md").write_text("second\n")
    assert make_book(checkout) == "from the cache"
