"""Seeds, hashes, profiles and errors: what every number of the book stands on."""

import hashlib
import subprocess
import sys
from importlib import metadata

import pytest
import torch

from robustvlm_lite import runtime
from robustvlm_lite.runtime import UserError, generator, near_miss, profile, resolve_device


def draw(*key):
    return torch.rand(4, generator=generator(*key)).tolist()


def test_a_generator_depends_on_its_key_alone():
    torch.manual_seed(1)
    first = draw(0, "photos/caltech", "pgd", 17)
    torch.manual_seed(2)
    torch.rand(100)
    assert draw(0, "photos/caltech", "pgd", 17) == first
    others = [(1, "photos/caltech", "pgd", 17), (0, "photos/web", "pgd", 17), (0, "photos/caltech", "pgd", 18)]
    for other in (*others, ("0", "photos/caltech", "pgd", 17)):
        assert draw(*other) != first, other


def test_a_generator_leaves_the_global_stream_alone():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    draw("anything")
    assert torch.equal(torch.rand(3), expected)


def test_a_key_means_the_same_in_every_process():
    """Python's own hash of a string would not do."""
    code = "from robustvlm_lite.runtime import generator; print(generator(0, 'a', 17).initial_seed())"
    other = subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": "1"}, capture_output=True, text=True)
    assert int(other.stdout) == generator(0, "a", 17).initial_seed(), other.stderr


def test_the_seed_is_the_documented_one():
    digest = hashlib.sha256(repr((0, "a")).encode()).digest()
    assert generator(0, "a").initial_seed() == int.from_bytes(digest[:8], "little") >> 1


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device() == torch.device("cpu") == resolve_device("cpu")
    for name in ("cuda", "cuda:1", "gpu", "cpux"):
        with pytest.raises(UserError, match=r"^[^\n]+$"):
            resolve_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device().type == "cuda"


def test_sha256_of_a_file_longer_than_a_block(tmp_path):
    content = b"ab" * (1 << 20)
    (tmp_path / "f").write_bytes(content)
    assert runtime.sha256(tmp_path / "f") == hashlib.sha256(content).hexdigest()


def test_profiles_choose_sizes_and_unknown_names_are_refused():
    for chapter, described in runtime.chapters().items():
        assert described["profiles"].keys() <= set(runtime.PROFILES), chapter
        for name, sizes in described["profiles"].items():
            assert vars(profile(chapter, name)) == sizes
    with pytest.raises(UserError, match="did you mean '04_tga_zsr'"):
        profile("04_tga", "tiny")
    with pytest.raises(UserError, match="did you mean 'tiny'"):
        profile("04_tga_zsr", "tny")


def test_near_miss_names_the_closest_or_all():
    assert near_miss("pgd2", ["pgd", "apgd-ce"]) == "did you mean 'pgd'?"
    assert near_miss("zzz", ["b", "a"]) == "known: a, b"


def test_versions_are_those_installed():
    versions = runtime.versions()
    assert versions["torch"] == metadata.version("torch") and versions["robustvlm_lite"] == metadata.version(
        "robustvlm_lite"
    )


def test_code_hash_moves_with_what_a_chapter_stands_on_and_with_nothing_else(tmp_path, monkeypatch):
    package = tmp_path / "robustvlm_lite"
    files = {
        "notebooks/04_x.py": "from robustvlm_lite import room\nimport robustvlm_lite.deep.part as part",
        "robustvlm_lite/__init__.py": "",
        "robustvlm_lite/room.py": "def f():\n    from .lazily import g",
        "robustvlm_lite/lazily.py": "from . import leaf",
        "robustvlm_lite/leaf.py": "import room_of_another_package",
        "robustvlm_lite/deep/__init__.py": "",
        "robustvlm_lite/deep/part.py": "from ..relative import h\nfrom .sister import i",
        "robustvlm_lite/deep/sister.py": "",
        "robustvlm_lite/relative.py": "",
        "robustvlm_lite/elsewhere.py": "from . import room",
        "robustvlm_lite/deep/unread.py": "",
        "notebooks/05_y.py": "other chapter",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    sizes = {page: {"profiles": {name: {"n": 1, "minutes": 3} for name in ("tiny", "small")}} for page in ("04_x", "05_y")}
    monkeypatch.setattr(runtime, "PACKAGE", package)
    monkeypatch.setattr(runtime, "chapters", lambda: sizes)
    before = runtime.code_sha256("04_x", "tiny")
    moved = set()
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\nanother = line")
        if runtime.code_sha256("04_x", "tiny") != before:
            moved.add(name)
        (tmp_path / name).write_text(text)
        assert runtime.code_sha256("04_x", "tiny") == before
    assert moved == set(list(files)[:9])
    (tmp_path / "notebooks/04_x.py").write_text("# a sentence of the page\n" + files["notebooks/04_x.py"])
    assert runtime.code_sha256("04_x", "tiny") == before
    for page, name, value, counts in (
        ("05_y", "tiny", {"n": 2}, False), ("04_x", "small", {"n": 2}, False),
        ("04_x", "tiny", {"minutes": 4}, False), ("04_x", "tiny", {"n": 2}, True),
    ):  # fmt: skip
        sizes[page]["profiles"][name] |= value
        assert (runtime.code_sha256("04_x", "tiny") != before) == counts


def test_code_hash_without_a_chapter_covers_the_package(tmp_path, monkeypatch):
    package = tmp_path / "robustvlm_lite"
    (package / "assets").mkdir(parents=True)
    for file in (package / "a.py", package / "assets" / "profiles.yml"):
        file.write_text("1")
    monkeypatch.setattr(runtime, "PACKAGE", package)
    seen = {runtime.code_sha256("")}
    for file in (package / "a.py", package / "assets" / "profiles.yml"):
        file.write_text("2")
        seen.add(runtime.code_sha256(""))
    assert len(seen) == 3 and runtime.code_sha256("evaluate") in seen


def test_git_commit_of_a_clean_dirty_and_missing_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "PACKAGE", tmp_path / "robustvlm_lite")
    assert runtime.git_commit() == ("", False)

    def git(*args):
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
        return subprocess.run(
            ["git", "-C", tmp_path, *identity, *args], check=True, capture_output=True, text=True
        ).stdout

    git("init", "-q")
    assert runtime.git_commit() == ("", False), "a checkout without a commit"
    (tmp_path / "f").write_text("1")
    git("add", "f")
    git("commit", "-qm", "first")
    assert runtime.git_commit() == (git("rev-parse", "HEAD").strip(), False)
    (tmp_path / "f").write_text("2")
    assert runtime.git_commit()[1]
