"""What a result card stands on: its chapter's code, the sizes of its profile, and every definition that this code reaches.

A card made by other code is stale. One whose page only reads differently is not, nor one whose rooms gained a function that
it never calls: so definitions count, not files, and neither comments nor docstrings do. A name is followed through imports
and re-exports; a module that is handed around whole counts whole, as does one in which a name is not found. In doubt, as with
a local variable that bears the name of a function, a definition counts. Only the room that draws is left out: a figure
changes no number of a card.
"""

import ast
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from .runtime import PACKAGE, asset, chapters


@dataclass(frozen=True)
class Source:
    """One module: its lines, the top-level statements that bind a name, and what an imported name stands for."""

    lines: list[str]
    bound: dict[str, list[ast.stmt]] = field(default_factory=dict)
    imports: dict[str, set[tuple[str, str]]] = field(default_factory=dict)  # (module, name in it; "" for the module itself)


def code_sha256(chapter: str, profile: str = "") -> str:
    """SHA-256, in hexadecimal, of what a card stands on; where there is no such chapter, of all of the package."""
    page = PACKAGE.parent / "notebooks" / f"{chapter}.py"
    if not page.exists():
        files = [*sorted(PACKAGE.rglob("*.py")), asset("profiles.yml")]
        return _digest(f"{path.name}\n{path.read_text(encoding='utf-8')}" for path in files)
    sizes = chapters().get(chapter, {}).get("profiles", {}).get(profile, {})
    chosen = {name: value for name, value in sizes.items() if name not in ("minutes", "memory_gb", "estimated", "where")}
    return _digest([json.dumps(chosen, sort_keys=True, default=str), _code(_source(page).lines, 1, None, set()), *reached(page)])


def reached(page: Path) -> list[str]:
    """The definitions of the package that a source file reaches, each as "module:name" and its code, sorted."""
    found: dict[tuple[Path, str], str] = {}
    waiting = [(page, name) for name in ("", *_source(page).bound)]
    while waiting:
        place = path, name = waiting.pop()
        if place not in found:
            source = _source(path)
            statements = source.bound.get(name, [])
            found[place] = "\n".join(_code(source.lines, *_span(s), _docstrings(s)) for s in statements)
            waiting += (target for s in statements for chain in _chains(s) for target in _resolve(path, chain))
    return sorted(
        f"{path.relative_to(PACKAGE).as_posix()}:{name}\n{code}"
        for (path, name), code in found.items()
        if code and path != page
    )


def _digest(texts) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


def _source(path: Path) -> Source:
    return _parsed(path, path.stat().st_mtime_ns)


@cache
def _parsed(path: Path, _changed: int) -> Source:
    """`_changed` keeps the cache true. Statements that bind no name, as a notebook has them, stand under the empty one."""
    text = path.read_text(encoding="utf-8")
    tree, source = ast.parse(text), Source(text.splitlines())
    for node in ast.walk(tree):  # imports inside functions, too
        if isinstance(node, ast.Import):
            for alias in node.names:
                whole = alias.name if alias.asname else alias.name.partition(".")[0]
                source.imports.setdefault(alias.asname or whole, set()).add((whole, ""))
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, [*_home(path, node.level), node.module]))
            for alias in node.names:
                source.imports.setdefault(alias.asname or alias.name, set()).add((module, alias.name))
    for statement in tree.body[ast.get_docstring(tree, clean=False) is not None :]:
        if not isinstance(statement, ast.Import | ast.ImportFrom):
            for name in _binds(statement):
                source.bound.setdefault(name, []).append(statement)
    return source


def _home(path: Path, level: int) -> list[str]:
    """The package that `level` dots in front of an import mean."""
    parts = path.relative_to(PACKAGE.parent).parts
    return list(parts[:-level]) if level else []


def _binds(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return [statement.name]
    targets = getattr(statement, "targets", [getattr(statement, "target", None)])
    names = [node.id for target in targets if target for node in ast.walk(target) if isinstance(node, ast.Name)]
    return names if names and isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign) else [""]


def _chains(node: ast.AST) -> Iterator[list[str]]:
    """The dotted names that a statement reads: `a.b(c)` gives [a, b] and [c]."""
    if isinstance(node, ast.Attribute | ast.Name):
        chain, inner = [], node
        while isinstance(inner, ast.Attribute):
            chain.append(inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name):
            yield [inner.id, *reversed(chain)]
            return
    for child in ast.iter_child_nodes(node):
        yield from _chains(child)


def _resolve(path: Path, chain: list[str]) -> Iterator[tuple[Path, str]]:
    """The definitions that a dotted name means in a module; none for a local variable or a name of another package."""
    source = _source(path)
    if chain[0] in source.bound:
        yield path, chain[0]
    for module, name in sorted(source.imports.get(chain[0], ())):
        yield from _inside(module, [*filter(None, [name]), *chain[1:]])


def _inside(module: str, chain: list[str]) -> Iterator[tuple[Path, str]]:
    """The definitions that a dotted name means for whoever imports it from a module."""
    path = _file(module)
    if not path or path.is_relative_to(PACKAGE / "plots"):
        return
    source = _source(path)
    yield path, ""
    if chain and (chain[0] in source.bound or source.imports.get(chain[0], {(module, chain[0])}) != {(module, chain[0])}):
        yield from _resolve(path, chain)
    elif chain and _file(f"{module}.{chain[0]}"):
        yield from _inside(f"{module}.{chain[0]}", chain[1:])
    else:  # handed around whole, or holding a name that is made at run time
        yield from ((path, bound) for bound in source.bound)


def _file(module: str) -> Path | None:
    """Where a module of the package is written."""
    home = PACKAGE.parent.joinpath(*module.split("."))
    files = (home / "__init__.py", home.with_name(f"{home.name}.py"))
    return next((f for f in files if module.partition(".")[0] == PACKAGE.name and f.is_file()), None)


def _span(statement: ast.stmt) -> tuple[int, int]:
    first = min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", []))])
    return first, statement.end_lineno


def _docstrings(statement: ast.stmt) -> set[int]:
    """Numbers of the lines that docstrings take; none shares its line with code (ruff, E702)."""
    taken = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node, clean=False) is not None:
            taken |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return taken


def _code(lines: list[str], first: int, last: int | None, left_out: set[int]) -> str:
    """Lines of code, counted from 1, without empty ones and whole-line comments, which is what the text of a page is."""
    kept = enumerate(lines[first - 1 : last], first)
    return "\n".join(line for k, line in kept if line.strip() and not line.lstrip().startswith("#") and k not in left_out)
