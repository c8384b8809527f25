"""Downloads and archives from a local server that truncates, corrupts, stalls, answers web pages and hides nothing."""

import hashlib
import re
import shutil
import time
from dataclasses import replace

import pytest
from small_sets import LEVELS, flat, shrink, tar, zipped
from toy_site import CONTENT

from robustvlm_lite import cli
from robustvlm_lite.data import load, prepare, registry
from robustvlm_lite.data.download import fetch
from robustvlm_lite.data.prepare import unpack
from robustvlm_lite.runtime import UserError

MD5 = hashlib.md5(CONTENT).hexdigest()


def left(folder):
    return sorted(path.name for path in folder.rglob("*"))


# ---- what is mended


@pytest.mark.parametrize("md5", ["", MD5])
@pytest.mark.parametrize("plan", [[], ["truncate"], ["truncate"] * 5, ["stall"], ["503", "truncate", "429"]], ids=str)
def test_a_file_comes_whole_and_only_what_was_missing_is_asked_again(site, tmp_path, plan, md5):
    site.plan = list(plan)
    began = time.monotonic()
    fetch(f"{site.url}/a.bin", tmp_path / "in" / "a.bin", md5)
    assert (tmp_path / "in" / "a.bin").read_bytes() == CONTENT and left(tmp_path) == ["a.bin", "in"]
    assert time.monotonic() - began < 5
    breaks = sum(how in ("truncate", "stall") for how in plan)
    assert len(set(filter(None, site.asked))) == breaks
    if plan == ["truncate"]:
        assert site.asked == [None, f"bytes={len(CONTENT) // 2}-"]


@pytest.mark.parametrize(
    "second, etag, md5",
    [
        ("ignore range", '"1"', MD5),  # the server sends everything again
        ("shift", '"1"', MD5),  # another part than asked: forgotten, then from the start
        ("well", "", ""),  # nothing would tell that the file is still the same
        ("well", 'W/"1"', ""),
    ],
)
def test_a_half_file_is_not_glued_to_what_does_not_fit(site, tmp_path, second, etag, md5):
    site.plan, site.etag = ["truncate", second], etag
    fetch(f"{site.url}/a.bin", tmp_path / "a.bin", md5)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    if not md5:
        assert site.asked == [None, None]


def test_a_file_that_changed_between_two_calls_is_fetched_from_the_start(site, tmp_path):
    site.plan = ["truncate", "nothing", "nothing", "nothing"]
    with pytest.raises(UserError, match=f"cannot fetch .+a.bin: it broke off after {len(CONTENT) // 2} bytes; run the"):
        fetch(f"{site.url}/a.bin", tmp_path / "a.bin")
    assert left(tmp_path) == ["a.bin.part", "a.bin.part.etag"]
    site.files["/a.bin"], site.etag = CONTENT[::-1], '"2"'
    fetch(f"{site.url}/a.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT[::-1] and left(tmp_path) == ["a.bin"]


def test_a_second_call_goes_on_and_a_whole_part_needs_no_byte(site, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(CONTENT[:1000])
    fetch(f"{site.url}/a.bin", tmp_path / "a.bin", MD5)
    (tmp_path / "b.bin.part").write_bytes(CONTENT)
    fetch(f"{site.url}/a.bin", tmp_path / "b.bin", MD5)
    assert site.asked == ["bytes=1000-", f"bytes={len(CONTENT)}-"]
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes() == CONTENT


# ---- what is refused

REFUSED = {
    "corrupt": (["corrupt"], f"expected MD5 {MD5} of .+, got [0-9a-f]+; removed it", []),
    "web page": (["page"], "got a web page", []),
    "not found": (["404"], "got HTTP 404", []),
    "log-in": (["403"], "got HTTP 403", []),
    "always overloaded": (["503"] * 9, "cannot fetch .+ HTTP 503", []),
    "no byte ever": (["nothing"] * 9, "it broke off after 0 bytes", ["a.bin.part", "a.bin.part.etag"]),
    "corrupt start": (["truncate", "corrupt"], "expected MD5", []),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_in_one_line_with_nothing_half_written(site, tmp_path, what):
    site.plan, match, rest = list(REFUSED[what][0]), *REFUSED[what][1:]
    with pytest.raises(UserError, match=match) as error:
        fetch(f"{site.url}/a.bin", tmp_path / "a.bin", MD5)
    assert "\n" not in str(error.value) and f"{site.url}/a.bin" in str(error.value)
    assert left(tmp_path) == rest


def test_no_network_is_one_line_at_once(tmp_path):
    with pytest.raises(UserError, match="cannot reach http://127.0.0.1:9/a.bin: Connection refused; check the network"):
        fetch("http://127.0.0.1:9/a.bin", tmp_path / "new" / "a.bin")
    assert left(tmp_path) == []


def test_a_full_disk_is_one_line(site, tmp_path):
    (tmp_path / "a.bin.part").symlink_to("/dev/full")
    with pytest.raises(UserError, match="cannot write .+a.bin.part: No space left on device; free some space"):
        fetch(f"{site.url}/a.bin", tmp_path / "a.bin")


# ---- the command


@pytest.fixture
def food(site, monkeypatch, tmp_path):
    """food101 as three classes of two images on the local server, in an archive inside an archive and a lone file."""
    from small_sets import food101, tar, zipped

    keys = food101(tmp_path / "original", monkeypatch)
    files = {str(f.relative_to(tmp_path / "original")): f.read_bytes() for f in tmp_path.rglob("original/**/*.*")}
    shutil.rmtree(tmp_path / "original")
    inner = tar({name.removeprefix("food-101/"): content for name, content in files.items()})
    site.files = {"/food.zip": zipped({"deep/food.tar.gz": inner}), "/credits.txt": b"thanks"}
    shrink(monkeypatch, "tga_zsr/food101", keys)
    dataset = registry.datasets()["food101"]
    md5 = hashlib.md5(site.files["/food.zip"]).hexdigest()
    downloads = (
        {"url": f"{site.url}/food.zip", "md5": md5, "into": "food-101", "inner": ["deep/food.tar.gz"]},
        {"url": f"{site.url}/credits.txt"},
    )
    everything = registry.datasets() | {"food101": replace(dataset, downloads=downloads)}
    monkeypatch.setattr(registry, "datasets", lambda: everything)
    return tmp_path / "root"


def test_prepare_fetches_checks_and_loads(food, site, capsys):
    assert cli.main(["data", "prepare", "food101", "--root", str(food)]) == 0
    shown = capsys.readouterr().out
    assert f"Food-101 is in {food}/full/food101" in shown and "tga_zsr/food101: 6 train, 6 test" in shown
    assert "coop/food101: expected split_zhou_Food101.json of Food-101 in" in shown
    assert (
        f"credits.txt: no checksum is published; SHA-256 of what came: {hashlib.sha256(b'thanks').hexdigest()}" in shown
    )
    assert sorted(path.name for path in (food / "full").iterdir()) == ["food101"] and not list(food.rglob("*.gz"))
    images = load("tga_zsr/food101", data_root=str(food), size=8)
    assert [images.class_names[y] for y in images.labels.tolist()] == ["apple pie"] * 2 + ["hot dog"] * 2 + [
        "sushi"
    ] * 2
    assert images.images[:, 0, 0, 0].tolist() == [LEVELS[0]] * 2 + [LEVELS[1]] * 2 + [LEVELS[2]] * 2
    asked = len(site.asked)
    assert cli.main(["data", "prepare", "coop/food101", "--root", str(food)]) == 0 and len(site.asked) == asked
    capsys.readouterr()
    assert cli.main(["data", "list", "--data-root", str(food)]) == 0
    listed = capsys.readouterr().out
    assert re.search(r"tga_zsr/food101 +here +6 +5 GB +images belong", listed)
    assert re.search(r"coop/food101 +lacks split_zhou_Food101.json +30300 ", listed)


def test_prepare_that_broke_off_goes_on_and_leaves_nothing_half(food, site, capsys):
    site.plan = ["well", "404"]
    assert cli.main(["data", "prepare", "food101", "--root", str(food)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert (
        len(said) == 1
        and said[0].startswith("robustvlm: expected a file at ")
        and "credits.txt, got HTTP 404" in said[0]
    )
    assert not (food / "full" / "food101").exists()
    assert cli.main(["data", "prepare", "food101", "--root", str(food)]) == 0
    assert site.asked == [None] * 3, "the first archive was not asked for again"


def test_prepare_says_by_its_code_that_no_use_is_whole(food, site, capsys, monkeypatch):
    shrink(monkeypatch, "tga_zsr/food101", n=7)
    assert cli.main(["data", "prepare", "food101", "--root", str(food)]) == 1
    assert "tga_zsr/food101: expected 7 train images of Food-101" in capsys.readouterr().out


def test_prepare_of_captions_asks_once(site, tmp_path, monkeypatch, capsys):
    site.files = {"/captions.zip": zipped({"captions.json": b"{}"})}
    entry = replace(registry.datasets()["coco_captions"], downloads=({"url": f"{site.url}/captions.zip"},))
    everything = registry.datasets() | {"coco_captions": entry}
    monkeypatch.setattr(registry, "datasets", lambda: everything)
    for _ in range(2):
        assert cli.main(["data", "prepare", "coco_captions", "--root", str(tmp_path)]) == 0
    assert site.asked == [None] and (tmp_path / "full/coco_captions/captions.json").read_text() == "{}"
    assert cli.main(["data", "list", "--data-root", str(tmp_path)]) == 0
    assert re.search(r"coco_captions +here +.captioning. +20 GB", capsys.readouterr().out)


def test_prepare_keeps_what_lies_there_and_refuses_what_is_in_the_way(food, site, capsys):
    (food / "full/food101").mkdir(parents=True)
    (food / "full/food101/split_zhou_Food101.json").write_text("[]")
    assert cli.main(["data", "prepare", "food101", "--root", str(food)]) == 0
    assert (food / "full/food101/split_zhou_Food101.json").read_text() == "[]"
    shutil.rmtree(food / "full/food101/food-101")
    assert cli.main(["data", "prepare", "food101", "--root", str(food)]) == 2
    assert "expected no credits.txt in" in capsys.readouterr().err


def test_prepare_refuses_in_one_line(food, site, capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for arguments, match in (
        (["imagenet", "--root", str(food)], "ImageNet-1k cannot be fetched by a program; obtain it: register"),
        (["food11", "--root", str(food)], "unknown dataset 'food11'; did you mean 'food101'?"),
        (["small/stl1", "--root", str(food)], "unknown pack 'small/stl1'; did you mean 'small/stl10'?"),
        (["food101", "--root", str(tmp_path / "file")], "cannot write"),
    ):
        assert cli.main(["data", "prepare", *arguments]) == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and match in said[0], said
    assert not (food / "full").exists()


def test_old_pythons_that_cannot_unpack_safely_are_told(tmp_path, monkeypatch):
    (tmp_path / "x.tar.gz").write_bytes(tar({"a": flat(40)}))
    monkeypatch.delattr(prepare.tarfile, "data_filter")
    with pytest.raises(UserError, match="Python 3.11.4 or later"):
        unpack(tmp_path / "x.tar.gz", tmp_path / "into")
