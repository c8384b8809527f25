"""Make notebooks/NN_slug.ipynb from notebooks/NN_slug.py, always the same bytes for the same source.

    python data_scripts/sync_notebooks.py                            write every pair
    python data_scripts/sync_notebooks.py --outputs-from RUN.ipynb   outputs of tagged cells from an executed run
    python data_scripts/sync_notebooks.py --check                    exit 1 and name each pair that differs

Outputs survive only in cells tagged `nbval-check-output`, and only as text. A cell that was edited loses its output.
"""

import argparse
import hashlib
import sys
from pathlib import Path

import jupytext
import nbformat

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
KEPT = "nbval-check-output"
METADATA = {
    "jupytext": {"formats": "ipynb,py:percent"},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def text_outputs(cell) -> list:
    """What a cell printed, then the text of what it returned; colors, images and timings are left behind."""
    printed = "".join(o["text"] for o in cell.outputs if o.output_type == "stream" and o.name == "stdout")
    outputs = [nbformat.v4.new_output("stream", name="stdout", text=printed)] if printed else []
    for o in cell.outputs:
        if o.output_type in ("execute_result", "display_data") and "text/plain" in o.data:
            outputs.append(nbformat.v4.new_output(o.output_type, data={"text/plain": o.data["text/plain"]}))
    return outputs


def outputs_by_source(executed: Path) -> dict[str, list]:
    """Source of a code cell -> outputs of its cells, in order. Empty if the notebook does not exist yet."""
    found = {}
    if executed.exists():
        for cell in nbformat.read(executed, as_version=4).cells:
            if cell.cell_type == "code":
                found.setdefault(cell.source, []).append(text_outputs(cell))
    return found


def build(py: Path, executed: Path) -> str:
    """Text of the notebook paired with `py`; outputs of its tagged cells are those of the same source in `executed`."""
    nb = jupytext.read(py)
    outputs = outputs_by_source(executed)
    for i, cell in enumerate(nb.cells):
        cell["id"] = hashlib.sha256(f"{py.stem}:{i}".encode()).hexdigest()[:8]
        if cell.cell_type == "code":
            kept = outputs.get(cell.source) if KEPT in cell.metadata.get("tags", []) else None
            cell.outputs, cell.execution_count = kept.pop(0) if kept else [], None
    nb.metadata = METADATA
    nbformat.validate(nb)
    return nbformat.writes(nb) + "\n"


def differing(folder: Path) -> list[str]:
    """One line for each pair that disagrees, or notebook without a source."""
    problems = []
    for py in sorted(folder.glob("*.py")):
        paired = py.with_suffix(".ipynb")
        if not paired.exists():
            problems.append(f"{paired.name} is missing; run `make sync`")
        elif build(py, paired) != paired.read_text(encoding="utf-8"):
            problems.append(f"{paired.name} differs from {py.name}; edit the .py, then run `make sync`")
    orphans = [p.name for p in sorted(folder.glob("*.ipynb")) if not p.with_suffix(".py").exists()]
    return problems + [f"{name} has no .py; notebooks are made from their .py" for name in orphans]


def sync(folder: Path, executed: Path | None = None) -> list[str]:
    """Write the pairs of `folder`; `executed` serves the pair that shares most cells with it. Names what changed."""
    sources = sorted(folder.glob("*.py"))
    served = None
    if executed:
        ran = outputs_by_source(executed).keys()
        served = max(sources, key=lambda py: sum(cell.source in ran for cell in jupytext.read(py).cells), default=None)
    changed = []
    for py in sources:
        paired = py.with_suffix(".ipynb")
        text = build(py, executed if py == served else paired)
        if not paired.exists() or paired.read_text(encoding="utf-8") != text:
            paired.write_text(text, encoding="utf-8")
            changed.append(paired.name)
    return changed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a pair differs")
    parser.add_argument("--outputs-from", type=Path, help="an executed notebook, whose tagged cells give their outputs")
    parser.add_argument("--folder", type=Path, default=NOTEBOOKS, help="where the pairs lie")
    args = parser.parse_args(argv)
    if args.outputs_from and not args.outputs_from.is_file():
        parser.error(f"expected an executed notebook, found no file {args.outputs_from}")
    if not args.check:
        print("\n".join(f"wrote {name}" for name in sync(args.folder, args.outputs_from)) or "every pair agrees")
        return 0
    problems = differing(args.folder)
    print("\n".join(problems) or "every pair agrees", file=sys.stderr if problems else sys.stdout)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
