"""One chapter from its source to its card: parameters are checked first, then papermill runs it in a folder of its own.

A run lies in OUT/<chapter>/<profile>-<seed>-<hash of the parameters>/. It is finished when `card.json` exists.
"""

import ast
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from . import runtime
from .runfolder import CARD, finished, run_folder
from .runtime import UserError, near_miss

TYPES = {"bool": bool, "int": int, "float": float, "str": str}
WANTED = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}
OPTIONS = ("profile", "seed")  # parameters of every chapter with an option of their own
OUT = "ROBUSTVLM_OUT"  # environment variable that tells the chapter its folder
NOISE = "--IPKernelApp.log_level=CRITICAL"  # what a kernel logs about its sockets; cells report their own errors


class RunError(RuntimeError):
    """A chapter ended without a card, and the reader's input is not to blame. One line."""


def run_chapter(
    chapter: str,
    *,
    profile: str = "tiny",
    parameters: Mapping[str, str] | None = None,
    seed: int = 0,
    out: str = "runs",
    resume: bool = False,
) -> Path:
    """Execute a chapter and return the path of its card.json.

    parameters: name -> text, read by the type of the default in the chapter's `parameters` cell. resume: keep the
    finished cells of an earlier, killed run with the same parameters (a finished run is returned as it is); otherwise
    its results are removed first.

    Raises UserError before anything starts for an unknown chapter or profile, an unknown, mistyped or out-of-range
    parameter, a missing file or device, or a folder that is in use or cannot be written; the notebook's own UserError
    comes out with its one line. Raises RunError where a cell fails otherwise.
    """
    sizes = runtime.profile(chapter, profile)
    notebook = read_source(chapter)
    check_seed(seed)
    values = declared(notebook, chapter)
    given = read_parameters(parameters or {}, values, runtime.chapters()[chapter].get("parameters", {}))
    values |= given
    check_resources(chapter, profile, sizes, values)
    settings = {name: value for name, value in values.items() if name not in OPTIONS}
    with run_folder(Path(out) / chapter, f"{profile}-{seed}", settings, resume=resume) as folder:
        card = folder / CARD
        if not finished(card):
            injected = given | {"profile": profile, "seed": seed}
            execute(notebook, folder / "notebook.ipynb", injected, chapter)
            if not card.exists():
                raise RunError(f"{chapter} ended without {card}; its last code cell has to finish the run")
    return card


# ---- what is checked before anything starts


def read_source(chapter: str):
    """The chapter's notebook, read from its .py."""
    import jupytext

    folder = runtime.PACKAGE.parent / "notebooks"
    if not folder.is_dir():
        raise UserError(f"expected the book's notebooks at {folder}, found none; run from a checkout of it")
    path = folder / f"{chapter}.py"
    if not path.is_file():
        raise UserError(f"expected the chapter at {path}, found none; check it out again")
    notebook = jupytext.read(path, fmt="py:percent")
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return notebook


def check_seed(seed: int) -> None:
    """Raises UserError unless every random generator of the book can take `seed`."""
    if not 0 <= seed < 2**32:
        raise UserError(f"expected a seed from 0 to 2**32 - 1, got {seed}; choose another --seed")


def declared(notebook, chapter: str = "the notebook") -> dict:
    """Parameter -> default, from the cell tagged `parameters`: plain or annotated assignments of literals."""
    cells = [cell.source for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        raise RunError(f"{chapter}: expected one cell tagged 'parameters', found {len(cells)}")
    defaults = {}
    for node in ast.parse(cells[0]).body:
        if isinstance(node, ast.AnnAssign):
            kind = TYPES[ast.unparse(node.annotation)]
            defaults[node.target.id] = kind(ast.literal_eval(node.value))
        elif isinstance(node, ast.Assign):
            defaults |= {target.id: ast.literal_eval(node.value) for target in node.targets}
    missing = [name for name in OPTIONS if name not in defaults]
    if missing:
        raise RunError(f"{chapter}: its parameters cell lacks {', '.join(missing)}")
    return defaults


def read_parameters(texts: Mapping[str, str], defaults: Mapping, ranges: Mapping) -> dict:
    """The values of `texts`, of the same types as the defaults and inside (low, high] where `ranges` has the name."""
    values = {}
    for name, text in texts.items():
        if name in OPTIONS:
            raise UserError(f"parameter {name!r} has an option of its own; use --{name} {text}")
        if name not in defaults:
            raise UserError(f"unknown parameter {name!r}; {near_miss(name, set(defaults) - set(OPTIONS))}")
        value = _typed(name, text, type(defaults[name]))
        low, high = ranges.get(name, (-math.inf, math.inf))
        if name in ranges and not low < value <= high:
            raise UserError(f"parameter {name}: expected a number in ({low:g}, {high:g}], got {text}; leave it out for the profile's")
        values[name] = value
    return values


def _typed(name: str, text: str, kind: type):
    try:
        value = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError
    except (KeyError, ValueError):
        raise UserError(f"parameter {name}: expected {WANTED[kind]}, got {text!r}") from None
    return value


def check_resources(chapter: str, profile: str, sizes, values: Mapping) -> None:
    """Raises UserError where the device, the backbone's weights or the data that a run will ask for are not there."""
    runtime.resolve_device(values.get("device", ""))
    model, pretrained = getattr(sizes, "model", "nano"), values.get("pretrained", "")
    bundled = runtime.asset("clip", f"{model}.json").exists()
    if bundled and not pretrained and not runtime.asset("clip", f"{model}.safetensors").exists():
        raise UserError(f"the bundled weights {model}.safetensors are missing; check out {runtime.asset('clip')} again")
    if not bundled and not pretrained:
        fetch = getattr(sizes, "weights", "open_clip_model.safetensors of this architecture")
        raise UserError(
            f"profile {profile!r} of {chapter} needs the weights of {model}, which are not bundled: fetch {fetch}, "
            "put it anywhere and pass -p pretrained FILE; or -p pretrained openai to download OpenAI's"
        )
    is_path = os.sep in pretrained or Path(pretrained).suffix  # anything else is a tag, which open_clip knows
    if is_path and not Path(pretrained).is_file():
        raise UserError(f"expected a weights file at pretrained, found none at {pretrained}; check the path")
    data_root = values.get("data_root", "")
    if data_root and not Path(data_root).is_dir():
        raise UserError(f"expected a folder at data_root, found none at {data_root}; give the one that holds the packs")
    for name in _data_sets(vars(sizes)):
        from .data import require

        require(name, data_root)


def _data_sets(sizes) -> Iterator[str]:
    """The names of data sets that are not bundled, wherever they stand in a profile."""
    if isinstance(sizes, str) and sizes.startswith(("small/", "tga_zsr/", "coop/")):
        yield sizes
    elif isinstance(sizes, Mapping):
        for part in (*sizes.keys(), *sizes.values()):
            yield from _data_sets(part)
    elif isinstance(sizes, list):
        for part in sizes:
            yield from _data_sets(part)


# ---- execution


class _Above:
    """A text stream that prints above a progress bar instead of through it."""

    def write(self, text: str) -> None:
        from tqdm import tqdm

        tqdm.write(text, end="")

    def flush(self) -> None:
        sys.stdout.flush()


@contextmanager
def _results_in(folder: Path) -> Iterator[None]:
    """Kernels that start inside this block inherit where their results go."""
    os.environ[OUT] = str(folder.resolve())
    try:
        yield
    finally:
        del os.environ[OUT]


def execute(notebook, target: Path, parameters: dict, chapter: str) -> None:
    """Run all cells into `target` with a progress bar; what the cells print appears as they print it.

    The chapter finds its folder, that of `target`, in the environment variable ROBUSTVLM_OUT.
    """
    import nbformat
    import papermill
    from nbclient.exceptions import DeadKernelError

    try:
        with tempfile.TemporaryDirectory() as temporary, _results_in(target.parent):
            source = Path(temporary) / f"{chapter}.ipynb"
            nbformat.write(notebook, source)
            papermill.execute_notebook(
                source,
                str(target).replace("{", "{{").replace("}", "}}"),  # papermill formats paths
                parameters,
                kernel_name="python3",
                stdout_file=_Above(),
                extra_arguments=[NOISE],
            )
    except papermill.PapermillExecutionError as error:
        if error.ename == "UserError":
            raise UserError(error.evalue) from None
        reason = f"{error.ename}: {error.evalue}".strip().splitlines()[0]
        raise RunError(f"{chapter} stopped in cell [{error.exec_count}]: {reason}; see {target}") from None
    except DeadKernelError:
        raise RunError(f"{chapter}: its Python process died, often for want of memory; see {target}") from None
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}; free space or change --out") from None
