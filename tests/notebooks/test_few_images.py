"""Every notebook runs, cell by cell under nbval, on the few images and steps that a reader in a hurry would ask for.

At the whole size of `tiny` they are executed by `make book`, in the workflow that publishes, and for every committed card.
"""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from robustvlm_lite.runtime import chapters

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


@pytest.mark.parametrize("chapter", chapters())
def test_a_chapter_runs_on_few_images(chapter, few, tmp_path):
    asked = {name: few[name] for name in chapters()[chapter]["parameters"] if name in few}
    copy = tmp_path / f"{chapter}.ipynb"
    nbformat.write(parameterize_notebook(load_notebook_node(str(NOTEBOOKS / copy.name)), asked), copy)
    options = ["--nbval-lax", "--nbval-current-env", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-o", "addopts="]
    done = subprocess.run([sys.executable, "-m", "pytest", *options, str(copy)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
