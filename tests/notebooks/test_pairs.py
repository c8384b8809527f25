"""The committed .ipynb are what their .py make, and the script that says so sees a difference."""

import shutil

import nbformat
import pytest
import sync_notebooks as pairs

SOURCE = """# %% [markdown]
# # A chapter

# %% tags=["parameters"]
seed = 0  # of everything random

# %% tags=["nbval-check-output"]
print("checked")

# %%
print("dropped")
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "01_a.py").write_text(SOURCE)
    (tmp_path / "02_b.py").write_text(SOURCE.replace("checked", "other"))
    pairs.sync(tmp_path)
    return tmp_path


@pytest.fixture
def executed(folder):
    """01_a as papermill leaves it: an injected cell, outputs everywhere, execution counts, other ids."""
    nb = nbformat.read(folder / "01_a.ipynb", as_version=4)
    nb.cells.insert(2, nbformat.v4.new_code_cell("seed = 1", metadata={"tags": ["injected-parameters"]}))
    for count, cell in enumerate(c for c in nb.cells if c.cell_type == "code"):
        cell.execution_count = count
        for name, text in (("stdout", "checked\n"), ("stderr", "a warning\n")):
            cell.outputs.append(nbformat.v4.new_output("stream", name=name, text=text))
    (folder / "run").mkdir()
    nbformat.write(nb, folder / "run" / "executed.ipynb")
    return folder / "run" / "executed.ipynb"


def test_committed_pairs_agree():
    assert not (problems := pairs.differing(pairs.NOTEBOOKS)), "\n".join(problems)


def test_same_bytes_every_time(folder):
    first = (folder / "01_a.ipynb").read_bytes()
    assert pairs.sync(folder) == []
    (folder / "01_a.ipynb").unlink()
    assert pairs.sync(folder) == ["01_a.ipynb"]
    assert (folder / "01_a.ipynb").read_bytes() == first


def test_only_tagged_cells_keep_text_outputs(folder, executed):
    assert pairs.sync(folder, executed) == ["01_a.ipynb"]
    cells = [c for c in nbformat.read(folder / "01_a.ipynb", as_version=4).cells if c.cell_type == "code"]
    assert [[o.text for o in c.outputs] for c in cells] == [[], ["checked\n"], []]
    assert pairs.sync(folder) == []  # a later sync keeps what is there
    source = folder / "01_a.py"
    source.write_text(source.read_text().replace('"checked"', '"changed"'))
    pairs.sync(folder)  # an edited cell loses its output
    assert "stdout" not in (folder / "01_a.ipynb").read_text()


def test_check_names_the_pair_that_differs(folder, capsys):
    assert pairs.main(["--check", "--folder", str(folder)]) == 0
    (folder / "02_b.py").write_text(SOURCE)
    shutil.copy(folder / "01_a.ipynb", folder / "03_orphan.ipynb")
    (folder / "01_a.ipynb").unlink()
    capsys.readouterr()
    assert pairs.main(["--check", "--folder", str(folder)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == ["01_a.ipynb", "02_b.ipynb", "03_orphan.ipynb"]


def test_hand_edited_notebook_is_seen(folder):
    paired = folder / "01_a.ipynb"
    paired.write_text(paired.read_text().replace("dropped", "edited"))
    assert pairs.differing(folder) == ["01_a.ipynb differs from 01_a.py; edit the .py, then run `make sync`"]
