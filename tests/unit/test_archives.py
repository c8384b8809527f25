"""Archives: nothing leaves its folder, and a damaged one is named."""

import pytest
from small_sets import tar, zipped

from robustvlm_lite.data.prepare import unpack
from robustvlm_lite.runtime import UserError

CONTENT = bytes(range(256)) * 4000  # about a megabyte


@pytest.mark.parametrize(
    "name, content",
    [
        ("x.tar.gz", tar({"../out.txt": b"!"})),
        ("x.tgz", tar({}, [("a", "../../out.txt")])),
        ("x.tar.gz", tar({}, [("a", "/etc/passwd")])),
        ("x.zip", zipped({"../out.txt": b"!"})),
        ("x.zip", zipped({"/out.txt": b"!"})),
        ("x.zip", zipped({"a\\..\\..\\out.txt": b"!"})),
        ("x.zip", zipped({"a": b"../out.txt"}, 0o120777)),
    ],
    ids=["tar up", "tar link up", "tar link to a file", "zip up", "zip root", "zip backslash", "zip link"],  # tar holds the time: no id
)
def test_an_archive_that_leads_out_of_its_folder_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"expected an archive of plain files, {name} holds an unsafe one"):
        unpack(tmp_path / name, tmp_path / "into" / "it")
    assert [path.name for path in (tmp_path / "into").rglob("*")] == ["it"] and not (tmp_path / "out.txt").exists()


@pytest.mark.parametrize(
    "name, content",
    [
        ("x.tar.gz", tar({"a": CONTENT})[:-200]),
        ("x.tar.gz", b"no archive"),
        ("x.zip", zipped({"a": b"abc"}).replace(b"abc", b"abd", 1)),
        ("x.zip", zipped({"a": CONTENT})[:-9]),
        ("x.tar", b""),
    ],
    ids=["tar.gz cut", "tar.gz of text", "zip of another sum", "zip cut", "empty tar"],
)
def test_a_damaged_archive_is_removed_and_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        UserError, match=f"expected a whole archive, {name} is damaged .+; removed it: run again"
    ) as error:
        unpack(tmp_path / name, tmp_path / "into")
    assert "\n" not in str(error.value) and not (tmp_path / name).exists()
