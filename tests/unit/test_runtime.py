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


@pytest.mark.parametrize(
    ("known", "answer"),
    [({"avx2": True}, False), ({"amx_bf16": True, "avx512_bf16": False}, True), ({"avx512_bf16": True}, True), (None, False)],
)
def test_bfloat16_counts_where_the_processor_says_that_it_multiplies_it(monkeypatch, known, answer):
    """None: a torch that does not say."""
    if known is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert runtime.multiplies_bfloat16.__wrapped__("cpu") is answer


def test_an_emulating_gpu_does_not_multiply_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not runtime.multiplies_bfloat16.__wrapped__("cuda")


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
