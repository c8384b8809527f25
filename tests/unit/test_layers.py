"""The house is what architecture says: imports go down only, rooms stay small, nothing is left half done."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "robustvlm_lite"
LAYERS = (
    ("runtime", "fingerprint", "threat", "stats"),
    ("scenes", "data", "transformer", "resnet", "clip", "captioner"),
    ("attention", "views", "prompts", "attacks"),
    ("defenses",),
    ("evaluate", "fewshot", "records", "sanity", "text_metrics"),
    ("cards", "rules", "claims", "verdicts", "estimate"),
    ("plots", "book", "runfolder", "runner", "practitioner", "doctor", "cli"),
)
LAYER = {room: n for n, rooms in enumerate(LAYERS) for room in rooms}
HOMES = {  # outside package -> the one room that imports it
    "open_clip": "clip",
    "torchattacks": "attacks",
    "pycocoevalcap": "text_metrics",
    "torchmetrics": "text_metrics",
}
# what a paper's module may import of its own room
SHARED_DEFENSES = ("base", "training", "checkpoints", "terms", "prompting", "prompt_files", "keyed", "recipe", "view_making")
MAX_FILE, MAX_FUNCTION, MAX_PARAMETERS = 300, 70, 12
UNFINISHED = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b|NotImplemented" + r"Error|except[^:\n]*:\s*pass\b")

SOURCES = sorted(
    p for folder in ("robustvlm_lite", "data_scripts", "benchmarks", "workflow", "book", "tests") for p in (ROOT / folder).rglob("*.py")
)
MODULES = [p for p in SOURCES if p.is_relative_to(PACKAGE) and p.name != "__main__.py" and p != PACKAGE / "__init__.py"]


def dotted(path: Path) -> list[str]:
    """["defenses", "tga_zsr"] for robustvlm_lite/defenses/tga_zsr.py; a package's __init__ counts as its room."""
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(tree: ast.AST, here: list[str], is_package: bool) -> set[tuple[str, ...]]:
    """Every import below `tree`, as parts: ("robustvlm_lite", "data", …) for our own, ("torch",) for others."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {tuple(a.name.split(".")) for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            full = ["robustvlm_lite", *here, *([""] if is_package else [])]
            stem = full[: len(full) - node.level] if node.level else []
            stem = [*stem, *(node.module.split(".") if node.module else [])]
            found |= {(*stem, a.name) for a in node.names}
    return found


def rooms(path: Path) -> set[tuple[str, ...]]:
    """What of our own package a module imports, without the leading "robustvlm_lite"."""
    found = imports(ast.parse(path.read_text(encoding="utf-8")), dotted(path), path.name == "__init__.py")
    return {
        parts[1:] for parts in found if parts[0] == "robustvlm_lite" and len(parts) > 1 and parts[1] != "__version__"
    }


def breaches(room: str, imported: set[tuple[str, ...]]) -> list[str]:
    """Imports of `room` that go up."""
    return [f"{room} imports {'.'.join(p)}" for p in sorted(imported) if LAYER.get(p[0], 99) > LAYER[room]]


def test_every_module_has_a_layer():
    unknown = sorted({dotted(p)[0] for p in MODULES} - LAYER.keys())
    assert not unknown, f"no layer for {unknown}: place them in LAYERS and in the table of CONTRIBUTING.md"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: ".".join(dotted(p)))
def test_imports_go_down(path):
    room = dotted(path)[0]
    assert not (found := breaches(room, rooms(path))), found
    for parts in imports(ast.parse(path.read_text(encoding="utf-8")), [], False):
        assert HOMES.get(parts[0], room) == room, f"{parts[0]} is imported by {room}, only {HOMES[parts[0]]} may"


@pytest.mark.parametrize("path", [p for p in MODULES if dotted(p)[0] == "defenses"], ids=lambda p: ".".join(dotted(p)))
def test_a_defense_knows_no_attack_and_no_other_paper(path):
    here = dotted(path)
    for parts in rooms(path):
        assert parts[0] != "attacks", f"{'.'.join(here)} imports {'.'.join(parts)}; let fit() receive the attack"
        if len(here) > 1 and parts[0] == "defenses" and (PACKAGE / "defenses" / f"{parts[1]}.py").exists():
            assert parts[1] in (*SHARED_DEFENSES, here[1]), (
                f"{'.'.join(here)} imports another defense: {'.'.join(parts)}"
            )


def test_rooms_of_one_layer_do_not_import_each_other_in_a_circle():
    edges = {}
    for path in MODULES:
        edges.setdefault(dotted(path)[0], set()).update(p[0] for p in rooms(path) if p[0] in LAYER)
    edges = {room: imported - {room} for room, imported in edges.items()}
    while done := {room for room, imported in edges.items() if not imported & edges.keys()}:
        edges = {room: imported for room, imported in edges.items() if room not in done}
    assert not edges, f"a circle among {sorted(edges)}"


def test_the_reader_of_imports_sees_each_form():
    source = "from . import a\nfrom .b import c\nfrom .. import d\nfrom ..e.f import g\n"
    source += "from robustvlm_lite.h import i\nimport torch.nn"
    ours = {"defenses.a", "defenses.b.c", "d", "e.f.g", "h.i"}
    expected = {("robustvlm_lite", *name.split(".")) for name in ours} | {("torch", "nn")}
    assert imports(ast.parse(source), ["defenses", "tga_zsr"], is_package=False) == expected
    assert imports(ast.parse("from .base import x\nfrom .. import d"), ["defenses"], is_package=True) == {
        ("robustvlm_lite", "defenses", "base", "x"),
        ("robustvlm_lite", "d"),
    }
    assert breaches("attacks", {("evaluate", "evaluate"), ("threat", "audit")}) == ["attacks imports evaluate.evaluate"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_stay_small_and_finished(path):
    text = path.read_text(encoding="utf-8")
    if not path.is_relative_to(ROOT / "tests"):
        assert (n := text.count("\n")) <= MAX_FILE, f"{n} lines, at most {MAX_FILE}: it has found a second subject"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= MAX_FUNCTION, f"{node.name} has {lines} lines, at most {MAX_FUNCTION}"
            parameters = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
            assert parameters <= MAX_PARAMETERS, f"{node.name} has {parameters} parameters, at most {MAX_PARAMETERS}"
    assert not (left := UNFINISHED.search(text)), f"unfinished: {left.group()!r}"
