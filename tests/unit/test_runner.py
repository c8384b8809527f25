"""`robustvlm run`: a chapter becomes a card, or one clear line; a killed run goes on to the same card."""

import json
import os
import signal
import time

import jupytext
import nbformat
import pytest
from toy_book import CHAPTER, NOTEBOOK, start

from robustvlm_lite import cli, runner
from robustvlm_lite.cards import comparable, load_card
from robustvlm_lite.runfolder import finished, run_folder
from robustvlm_lite.runtime import UserError


def only(pattern, folder):
    (found,) = folder.glob(pattern)
    return found


def wait_for(condition, seconds=600):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def test_a_run_becomes_a_card_and_a_killed_one_the_same_card(checkout, capfd):
    command = ["run", CHAPTER, "-p", "eps_255", "2", "--seed", "3", "--out"]
    out, straight = checkout / "runs", checkout / "straight"
    assert cli.main([*command, str(straight)]) == 0
    shown, bar = capfd.readouterr()
    folder = only(f"{CHAPTER}/tiny-3-????????", straight)
    assert {"notebook.ipynb", "card.json", "examples.parquet"} <= {p.name for p in folder.iterdir()}
    card = load_card(folder)
    assert card["seed"] == 3 and card["parameters"] == {"eps_255": 2.0, "n_images": 4}
    ran = nbformat.read(folder / "notebook.ipynb", as_version=4)
    nbformat.validate(ran)
    assert "injected-parameters" in [tag for cell in ran.cells for tag in cell.metadata.get("tags", [])]
    assert "toy chapter, profile tiny, seed 3" in shown
    assert "toy/gray CLIP pgd-20 2 4 50.0 [0.0, 100.0]" in [" ".join(line.split()) for line in shown.splitlines()]
    assert str(folder / "card.json") in shown
    assert "Executing" in bar and "TCP" not in bar and runner.OUT not in os.environ

    slow = out / CHAPTER / "slow"
    slow.parent.mkdir(parents=True)
    slow.touch()
    process = start(checkout, *command, str(out))
    try:
        wait_for(lambda: list(out.glob(f"{CHAPTER}/tiny-3-*/cells/*.parquet")))
        folder = only(f"{CHAPTER}/tiny-3-*", out)
        assert cli.main([*command, str(out), "--resume"]) == 2
        assert f"{folder} is in use by process {process.pid}" in capfd.readouterr().err
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    time.sleep(4)  # its kernel has a process group of its own, and ends within seconds of its parent
    slow.unlink()
    assert not (folder / "card.json").exists()
    assert cli.main([*command, str(out), "--resume"]) == 0
    assert (folder.parent / "computed").read_text() == "pgd-20"  # the finished cell was reused
    assert comparable(load_card(folder)) == comparable(card)

    capfd.readouterr()
    (folder / "notebook.ipynb").unlink()
    assert cli.main([*command, str(out), "--resume"]) == 0  # finished: nothing runs
    assert "had finished before" in capfd.readouterr().out and not (folder / "notebook.ipynb").exists()


FAILURES = {
    "a bad input that the notebook finds": ("13", 2, "robustvlm: expected another number than 13, got 13; choose 12"),
    "a bug": ("14", 1, "robustvlm: 99_toy stopped in cell [3]: ValueError: a bug; see "),
    "a dead kernel": ("15", 1, "robustvlm: 99_toy: its Python process died"),
    "a chapter without a card": ("16", 1, "robustvlm: 99_toy ended without "),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failing_chapter_leaves_one_line_and_no_card(checkout, capfd, name):
    eps_255, code, line = FAILURES[name]
    out = checkout / "runs"
    assert cli.main(["run", CHAPTER, "-p", "eps_255", eps_255, "--out", str(out)]) == code
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last == line if code == 2 else last.startswith(line), last
    kept = {path.name for path in out.rglob("*") if path.is_file()}
    assert kept == (set() if code == 2 else {".lock", "notebook.ipynb"})


def test_parameters_are_read_by_the_type_of_their_default():
    notebook = jupytext.reads(NOTEBOOK, fmt="py:percent")
    defaults = runner.declared(notebook)
    assert defaults["n_images"] == 4 and defaults["eps_255"] == 1.0
    texts = {"eps_255": "2", "n_images": "8", "warm": "true", "device": "cpu"}
    read = runner.read_parameters(texts, defaults, {"eps_255": [0, 64]})
    assert read == {"eps_255": 2.0, "n_images": 8, "warm": True, "device": "cpu"}
    assert type(read["eps_255"]) is float


def test_a_folder_is_named_by_its_parameters(tmp_path):
    names = []
    for settings in ({"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 1, "b": 3}):
        with run_folder(tmp_path, "tiny-0", settings, resume=False) as folder:
            names.append(folder.name)
    assert names[0] == names[1] != names[2]


def test_earlier_results_are_removed_unless_the_run_is_resumed(tmp_path):
    def left(resume):
        with run_folder(tmp_path, "tiny-0", {}, resume=resume) as folder:
            return {path.name for path in folder.iterdir()} - {".lock"}

    with run_folder(tmp_path, "tiny-0", {}, resume=False) as folder:
        (folder / "cells").mkdir()
        (folder / "cells" / "one.parquet").touch()
        (folder / "card.json").touch()
    assert left(resume=True) == {"cells", "card.json"}
    assert left(resume=False) == set()


def test_a_lock_outlives_no_process(tmp_path):
    """A lock file of a dead process is taken over; one that is held refuses a second run."""
    with run_folder(tmp_path, "tiny-0", {}, resume=False) as folder:
        (folder / "card.json").write_text(json.dumps({}))
        with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
            with run_folder(tmp_path, "tiny-0", {}, resume=True):
                pytest.fail("two runs in one folder")
        assert (folder / "card.json").exists()  # the one that was refused touched nothing
    assert (folder / ".lock").exists()
    with run_folder(tmp_path, "tiny-0", {}, resume=True) as again:
        assert again == folder and (folder / "card.json").exists()


def test_an_unreadable_card_is_refused_and_stays(tmp_path):
    with run_folder(tmp_path, "tiny-0", {}, resume=False) as folder:
        (folder / "card.json").write_text('{"schema": 7}')
    with pytest.raises(UserError, match="expected schema 1, got 7"):
        with run_folder(tmp_path, "tiny-0", {}, resume=True):
            finished(folder / "card.json")
    assert (folder / "card.json").read_text() == '{"schema": 7}'


def test_after_bad_input_only_what_was_there_before_is_there(tmp_path):
    with pytest.raises(UserError), run_folder(tmp_path / "a" / "b", "tiny-0", {}, resume=False) as folder:
        (folder / "half.tmp").touch()
        raise UserError("no")
    assert not list(tmp_path.iterdir())
