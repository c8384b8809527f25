"""Every chapter passes the gates, and each gate fails on a planted fault."""

import functools
import json
from pathlib import Path

import gates
import jupytext
import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = sorted((ROOT / "notebooks").glob("[0-9]*.py"))
PAGES = sorted((ROOT / "book").glob("*.md"))
AT_THE_ROOT = sorted(ROOT.glob("*.md"))  # README and its kin: what a visitor of the repository reads
PROFILES = yaml.safe_load((ROOT / "robustvlm_lite" / "assets" / "profiles.yml").read_text())
MINUTES = {name: {sizes["minutes"] for sizes in chapter["profiles"].values()} for name, chapter in PROFILES.items()}
REPOSITORY = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]
read = functools.cache(jupytext.read)

chapters = pytest.mark.parametrize("py", CHAPTERS, ids=lambda p: p.stem)


def none(problems):
    assert not problems, "\n" + "\n".join(problems)


@chapters
def test_cells_are_short(py):
    none(gates.cell_lines(read(py)))


@chapters
def test_chapter_keeps_the_budget_of_its_kind(py):
    kinds = {gates.PAPER_CHAPTERS: gates.PAPER_BUDGET, gates.FOUNDATIONS: gates.FOUNDATIONS_BUDGET, gates.LOOK_UP: gates.LOOK_UP_BUDGET}
    (budget,) = [budget for chapters_of, budget in kinds.items() if py.stem in chapters_of]
    none(gates.budgets(read(py), budget))


@chapters
def test_every_figure_has_alternative_text(py):
    none(gates.figures(read(py)))


@chapters
def test_frame_of_the_chapter(py):
    nb = read(py)
    none(gates.badges(nb, py.stem, REPOSITORY) + gates.parameters(nb) + gates.footer(nb))


@chapters
def test_checked_cells_hold_an_output(py):
    none(gates.empty_checked_cells(nbformat.read(py.with_suffix(".ipynb"), as_version=4)))


@chapters
def test_prose_of_the_chapter(py):
    for text in gates.markdown(read(py)):
        none(gates.typed_numbers(text) + gates.long_paragraphs(text) + gates.british(text))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_prose_of_the_pages(page):
    text = page.read_text(encoding="utf-8")
    none(gates.typed_numbers(text) + gates.long_paragraphs(text) + gates.british(text))


@pytest.mark.parametrize("page", PAGES + AT_THE_ROOT, ids=lambda p: p.name)
def test_no_result_is_typed_outside_the_chapters_either(page):
    text = page.read_text(encoding="utf-8")
    none(gates.typed_numbers(text) + gates.typed_times(text, MINUTES) + gates.pictures(text))


@chapters
def test_times_of_a_chapter_are_those_of_its_profiles(py):
    nb = read(py)
    head = [nb.cells[0].source.replace("\n", f" {py.stem} ")]  # its badges stand on lines of their own
    for text in head + [line + py.stem for cell in gates.tagged(nb, "parameters") for line in cell.splitlines()]:
        none(gates.typed_times(text, MINUTES))


@pytest.mark.parametrize("folder", sorted((ROOT / "book" / "cards").iterdir()), ids=lambda p: p.name)
def test_minutes_of_a_profile_are_about_those_of_its_card(folder):
    """Another machine is not faster than twice, and nobody forgot to measure again."""
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    stated = PROFILES[card["chapter"]]["profiles"][card["profile"]]["minutes"]
    took = max(1, card["provenance"]["wall_s"] / 60)
    assert stated / 2 <= took <= 2 * stated, f"profiles.yml says {stated} minutes, the card took {took:.1f}"


# --- the gates themselves: each planted fault is found, each lawful use is let through

ALT = "Robust accuracy falls to chance as the budget grows"
SHOW = f'book.show(fig, "curve", alt="{ALT}", caption="Accuracy against the budget.")'


def notebook(*code, text="# Title"):
    cells = [new_markdown_cell(text), *(new_code_cell(c) for c in code)]
    return new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})


@pytest.mark.parametrize(
    "text",
    [
        "TGA-ZSR keeps 41.9 % of the images.",
        "It keeps 41.9% under attack.",
        "Accuracy rises by 3.2 points.",
        "Robust accuracy is 0.42 here.",
        "About 40 percent survive.",
        "| method | accuracy |\n|---|---|\n| TeCoA | 41.2 % |",
        "| method | accuracy |\n|---|---|\n| TeCoA | 0.41 |",
        "| method | published | ours |\n|---|---|---|\n| TeCoA | 40.0 % | 41.2 % |",
        "A published value stands here.\n\nOurs is 41.2 %.",
        "Seven of 10 claims are reproduced.",
        "It is right on 41 of 100 images.",
        "Our step is 1.8 times faster.",
        "It takes 3× as long.",
    ],
)
def test_typed_result_is_found(text):
    assert len(gates.typed_numbers(text)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "The published robust accuracy is 42.09 %.",
        "It reports 42.09 % {cite:p}`tga_zsr`.",
        "Clean accuracy falls to 56.44 % (paper, Table 2).",
        "The band is the 95 % interval.",
        "The weight $\\alpha = 0.08$ was chosen for robust accuracy.",
        "We set `eps_255 = 1.0`; robust accuracy is {glue:text}`tga:.1f` %.",
        "```python\nassert robust > 0.42  # 42 % robust accuracy\n```",
        "| method | published | ours |\n|---|---|---|\n| TeCoA | 40.0 % | see the card |",
        "| source | accuracy |\n|---|---|\n| published | 40.0 % |",
        "The map has 49 patches and version 0.25.",
        "It holds 3 of 37 breeds, and TeCoA took ten times more steps (paper, Section 4).",
        "Twice as many seeds cost twice as much.",
    ],
)
def test_lawful_number_is_let_through(text):
    assert gates.typed_numbers(text) == []


def test_typed_times_are_found_and_those_of_a_profile_let_through():
    minutes = {"01_clip": {1, 10}, "04_tga_zsr": {3}}
    for fault in ("It takes 3 minutes.", "It takes three minutes.", "| [01](notebooks/01_clip.py) | 3 minutes |",
                  "A run of 04_tga_zsr ends after 3 hours."):  # fmt: skip
        assert len(gates.typed_times(fault, minutes)) == 1, fault
    for fine in ("| [01](notebooks/01_clip.py) | 1 minute | about 10 minutes |", "```\nsleep 3 minutes\n```", "A few minutes."):
        assert gates.typed_times(fine, minutes) == [], fine


def test_figure_gate():
    assert gates.figures(notebook("fig = draw()", SHOW)) == []
    for fault in (
        "plt.show()",
        'book.show(fig, "a", caption="A caption of some length.")',
        SHOW.replace(ALT, " "),
    ):
        assert len(gates.figures(notebook(fault))) == 1, fault
    for picture in ("![](a.png)", "<img src='a.png'>", "```{figure} a.png\n:name: a\n```"):
        assert len(gates.figures(notebook("x = 1", text=picture))) == len(gates.pictures(picture)) == 1, picture
    assert gates.figures(notebook("%matplotlib inline\nx = 1", text="![a clean image beside its attack](a.png)")) == []


def test_cell_gate():
    short, long, endless = "x = 1", "\n".join(["x = 1"] * 21), "\n".join(["x = 1"] * 41)
    assert gates.cell_lines(notebook(*[short] * 9, long)) == []
    assert "median" in gates.cell_lines(notebook(*["\n".join([short] * 9)] * 3))[0]
    assert "90th" in gates.cell_lines(notebook(*[short] * 8, long, long))[0]
    assert "41 lines" in gates.cell_lines(notebook(*[short] * 20, endless))[0]


def test_budget_gate():
    full = notebook(*["x = 1"] * 15, *[SHOW] * 7, text="word " * 3000)
    assert gates.budgets(full) == []
    assert len(gates.budgets(notebook("x = 1"))) == 3
    small = notebook(*["x = 1"] * 35, *[SHOW] * 5, text="word " * 2100)
    assert gates.budgets(small, gates.FOUNDATIONS_BUDGET) == [] and len(gates.budgets(small)) == 3
    assert len(gates.budgets(notebook("x = 1"), gates.FOUNDATIONS_BUDGET)) == 3


def test_frame_gates():
    parameters = new_code_cell(
        'profile = "tiny"  # size of the run\nseed = 0  # of everything random', metadata={"tags": ["parameters"]}
    )
    colab = REPOSITORY.replace("https://github.com", "https://colab.research.google.com/github")
    row = (
        f"# Title\n\n[Colab]({colab}/blob/main/notebooks/04_tga_zsr.ipynb) · "
        f"[source]({REPOSITORY}/blob/main/notebooks/04_tga_zsr.py) · [paper](https://arxiv.org/abs/2410.21802) · "
        f"[card]({REPOSITORY}/blob/main/book/cards/04_tga_zsr-tiny.json) · CPU: 3 min"
    )
    nb = notebook("book.footer(card)", text=row)
    nb.cells.insert(1, parameters)
    assert gates.badges(nb, "04_tga_zsr", REPOSITORY) + gates.parameters(nb) + gates.footer(nb) == []
    bare = notebook("seed = 0")
    assert len(gates.badges(bare, "04_tga_zsr", REPOSITORY)) == 5 and gates.parameters(bare) and gates.footer(bare)
    assert gates.badges(new_notebook(cells=nb.cells), "04_tga_zsr", REPOSITORY) == [
        "the head of the .py names no kernelspec python3"
    ]
    parameters.source = "\n".join(f"p{i} = {i}  # one" for i in range(9)) + "\nseed = 0"
    assert len(gates.parameters(nb)) == 2


def test_checked_cell_gate():
    nb = new_notebook(cells=[new_code_cell("print(1)", metadata={"tags": ["nbval-check-output"]})])
    assert len(gates.empty_checked_cells(nb)) == 1
    nb.cells[0].outputs = [nbformat.v4.new_output("stream", text="1\n")]
    assert gates.empty_checked_cells(nb) == []


def test_prose_gates():
    assert len(gates.long_paragraphs("word " * 61)) == 1
    assert gates.long_paragraphs("word " * 60 + "\n\n- " + "word " * 60 + "\n- " + "word " * 60) == []
    assert gates.british("a defence of `defence`") == ["'defence': American spelling"]
