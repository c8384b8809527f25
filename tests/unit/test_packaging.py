"""What is written twice agrees, and what is tracked is small, unpickled and free of this or that machine."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import robustvlm_lite

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = (ROOT / "requirements.lock").read_text()
MIB = 2**20
PICKLED = (".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".bin", ".npy", ".joblib")
HOME = re.compile(r"(?<![\w.])/(home|Users|root)/\w|\b[A-Z]:\\Users\b")
ALLOWED_CONFLICT = ("torchattacks", "requests")  # see [tool.uv] in pyproject.toml


def tracked() -> list[Path]:
    """Files of the repository: tracked ones, and new ones that git would not ignore."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout: which files are tracked is unknown")
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    return [path for name in names if name and (path := ROOT / name).is_file()]


def text_files() -> list[tuple[str, str]]:
    """(name, text) of what people wrote here."""
    suffixes = (".py", ".md", ".yml", ".yaml", ".toml", ".ipynb", ".json", ".cff", ".bib", ".css", ".js", ".sh", ".lock", "")
    mine = [p for p in tracked() if p.suffix in suffixes and "mathjax" not in p.parts]
    return [(str(p.relative_to(ROOT)), p.read_text(encoding="utf-8")) for p in mine]


def asked() -> list[Requirement]:
    return [Requirement(r) for r in PYPROJECT["project"]["dependencies"] + PYPROJECT["dependency-groups"]["dev"]]


def pins() -> dict[str, list[str]]:
    """Canonical name -> versions in the lock; several where markers tell Pythons or systems apart."""
    found = {}
    for name, version in re.findall(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==([^\s;\\]+)", LOCK, flags=re.M):
        found.setdefault(canonicalize_name(name), []).append(version)
    return found


@pytest.mark.parametrize("requirement", asked(), ids=lambda r: r.name)
def test_lock_pins_each_dependency_inside_its_range(requirement):
    versions = pins().get(canonicalize_name(requirement.name), [])
    assert versions, f"{requirement.name} is not in requirements.lock; make the lock again"
    outside = [v for v in versions if v not in requirement.specifier]
    assert not outside, f"lock has {requirement.name} {outside}, pyproject.toml asks for {requirement.specifier}"


def test_lock_is_hashed_and_names_no_address():
    assert LOCK.count("--hash=sha256:") >= sum(map(len, pins().values()))
    assert not re.search(r"https?://|index-url|\.org|\.io\b", LOCK), "requirements.lock names a host"


def test_environment_yml_adds_no_version_of_its_own():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, *rest = environment["dependencies"]
    assert rest == ["pip", {"pip": ["uv"]}], "versions live in requirements.lock; conda gives Python and uv"
    assert python.startswith("python")
    assert SpecifierSet(python.removeprefix("python")) == SpecifierSet(PYPROJECT["project"]["requires-python"])


def test_version_is_one():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.M).group(1)
    assert {PYPROJECT["project"]["version"], robustvlm_lite.__version__, citation, newest} == {"0.1.0"}


def test_installed_packages_agree_but_for_one_known_pair():
    """What `pip check` reports."""
    conflicts = set()
    for distribution in metadata.distributions():
        for line in distribution.requires or []:
            requirement = Requirement(line)
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            try:
                version = metadata.version(requirement.name)
            except metadata.PackageNotFoundError:
                version = "missing"
            if version == "missing" or not requirement.specifier.contains(version, prereleases=True):
                conflicts.add((canonicalize_name(distribution.name), canonicalize_name(requirement.name)))
    assert conflicts <= {ALLOWED_CONFLICT}, sorted(conflicts)


def test_tracked_files_are_small_and_unpickled():
    sizes = {p.relative_to(ROOT): p.stat().st_size for p in tracked()}
    assert not (large := {str(p): n for p, n in sizes.items() if n > 15 * MIB}), large
    assert (total := sum(sizes.values())) <= 56 * MIB, f"{total / MIB:.1f} MiB in all"
    assert not (pickled := [str(p) for p in sizes if p.suffix in PICKLED]), pickled


def test_no_path_of_a_home():
    assert not (found := [(name, hit.group()) for name, text in text_files() if (hit := HOME.search(text))]), found
    assert HOME.search("open('/ho" + "me/jane/data')") and not HOME.search("https://example.com/home/page")


ADDRESS = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]
LINKED = re.compile(r"github(?:\.com)?/([\w.-]+/[\w.-]+?)(?=\.git\b|[/\s\"')>\],]|$)")


def other_addresses(files: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """(file, owner/name) of each link to a repository of this name or owner that is not the one of _config.yml."""
    owner, name = ADDRESS.split("/")[3:5]
    links = [(file, found) for file, text in files for found in LINKED.findall(text)]
    return [(file, found) for file, found in links if found != f"{owner}/{name}" and {owner, name} & set(found.split("/"))]


def test_one_address_of_the_repository():
    """_config.yml decides; badges and links repeat it."""
    assert not (other := other_addresses(text_files())), f"still another address than {ADDRESS}: {other}"


@pytest.mark.parametrize("file", ["CITATION.cff", "README.md", *(f"notebooks/{p.name}" for p in (ROOT / "notebooks").glob("[0-9]*.py"))])
def test_the_address_stands_where_it_is_needed(file):
    """A file that forgets it is named here, one that holds another by the test above."""
    assert ADDRESS.split("//")[1] in (ROOT / file).read_text(encoding="utf-8").replace("com/github/", "com/github.com/")


def test_an_address_left_behind_is_named():
    owner, name = ADDRESS.split("/")[3:5]
    moved = [("a.md", f"[x](https://github.com/other/{name}/tree/main)"), ("b.py", f'"https://github.com/{owner}/{name}"')]
    moved += [("c.cff", f"repository-code: https://github.com/other/{name}"), ("d.yml", "uses: https://github.com/actions/cache")]
    moved += [("e.ipynb", f"https://colab.research.google.com/github/{owner}/old/blob/main/notebooks/01.ipynb")]
    assert other_addresses(moved) == [("a.md", f"other/{name}"), ("c.cff", f"other/{name}"), ("e.ipynb", f"{owner}/old")]


def test_readme_holds_the_commands_that_ci_and_the_book_use():
    blocks = re.findall(r"^```bash\n(.*?)\n```", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    assert len(blocks) >= 2, "README.md needs two fenced bash blocks: set-up with the main job, then the tests"
    setup = (ROOT / "book" / "setup.md").read_text()
    make = (ROOT / "Makefile").read_text().replace("$(PY)", ".venv/bin/python")
    assert all("\n" not in block and block in setup for block in blocks[:2]), "README.md and book/setup.md disagree"
    assert f"\n\t{blocks[1]}\n" in make[make.index("\ncheck:") :], "`make check` is not the README's second command"


def test_the_readme_s_snippet_runs_and_prints_an_accuracy(capsys):
    (block,) = re.findall(r"^```python\n(.*?)\n```", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    few = block.replace("100", "8").replace("pgd-20", "pgd-2")
    assert few != block
    exec(compile(few, "README.md", "exec"), {})
    assert re.fullmatch(r"tensor\([01]\.\d*\)", capsys.readouterr().out.strip())



def test_ruff_is_content():
    run = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--output-format=concise", "."],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
