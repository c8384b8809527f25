"""The set-up cell of a chapter, which Colab runs first: the same in every chapter, and its install line resolves."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = sorted((ROOT / "notebooks").glob("[0-9]*.py"))
ADDRESS = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]
CONDITION = "importlib.util.find_spec('robustvlm_lite') is None"


def setup_block(cells: list[str]) -> ast.If:
    """The block that runs where the package is not installed. Raises AssertionError unless there is exactly one."""
    found = [
        node
        for source in cells
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.If) and ast.unparse(node.test) == CONDITION
    ]
    assert len(found) == 1, f"expected one block `if {CONDITION}:`, found {len(found)}"
    return found[0]


def commands(block: ast.If, python: str) -> list[list[str]]:
    """The words of every command that the block runs, with `python` for sys.executable."""
    known, found = {}, []
    for node in block.body:
        if isinstance(node, ast.Assign):
            known[node.targets[0].id] = node.value
        elif isinstance(node, ast.Expr) and ast.unparse(node.value.func) == "subprocess.run":
            assert any(k.arg == "check" and ast.literal_eval(k.value) for k in node.value.keywords), "check=True is missing"
            words = node.value.args[0]
            words = known[words.id] if isinstance(words, ast.Name) else words
            found.append([python if ast.unparse(w) == "sys.executable" else ast.literal_eval(w) for w in words.elts])
    return found


def code(py: Path) -> list[str]:
    return [cell.source for cell in jupytext.read(py).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("py", CHAPTERS, ids=lambda p: p.stem)
def test_a_chapter_clones_and_installs_like_every_other(py):
    block = setup_block(code(py))
    clone, get_uv, install = commands(block, "python")
    assert clone == ["git", "clone", "-q", ADDRESS]
    assert get_uv == ["python", "-m", "pip", "install", "-q", "uv"]
    assert install == ["python", "-m", "uv", "pip", "install", "-q", "--system", "-e", "."]
    assert ast.unparse(block) == ast.unparse(setup_block(code(CHAPTERS[0])))
    first = next(i for i, source in enumerate(code(py)) if "robustvlm_lite" in source)
    assert "find_spec" in code(py)[first], "something needs the package before it is installed"


def test_a_changed_line_is_seen():
    block = setup_block([f"if {CONDITION}:\n    subprocess.run(['pip', 'install', 'x'], check=True)"])
    assert commands(block, "python") == [["pip", "install", "x"]]
    with pytest.raises(AssertionError, match="found 0"):
        setup_block(["import robustvlm_lite"])
    with pytest.raises(AssertionError, match="check=True"):
        commands(setup_block([f"if {CONDITION}:\n    subprocess.run(['x'])"]), "python")


@pytest.mark.slow
@pytest.mark.parametrize("py", CHAPTERS, ids=lambda p: p.stem)
def test_the_set_up_of_a_chapter_works_in_an_empty_environment(py, tmp_path_factory):
    """What Colab does, short of its own packages: install into an environment with pip alone, then the tiny run."""
    python = _installed(py, tmp_path_factory)
    run = [python, "-m", "robustvlm_lite.cli", "run", py.stem, "--out", str(tmp_path_factory.mktemp("runs"))]
    subprocess.run(run, cwd=ROOT, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})


_environments: dict[str, str] = {}


def _installed(py: Path, tmp_path_factory) -> str:
    """Python of an environment in which the chapter's lines were run, one environment for equal lines."""
    _, get_uv, install = commands(setup_block(code(py)), "python")
    key = repr((get_uv, install))
    if key not in _environments:
        folder = tmp_path_factory.mktemp("colab")
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python = str(folder / "bin" / "python")
        subprocess.run([python, *get_uv[1:]], check=True)
        # `--system` is Colab's own Python; here it is this environment's.
        words = [word for word in install[1:] if word != "--system"]
        subprocess.run([python, *words, "--python", python], cwd=ROOT, check=True)
        _environments[key] = python
    return _environments[key]
