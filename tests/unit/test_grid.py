"""The grid: which jobs a configuration asks for, what their cards add up to, and that Snakemake can read it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import leaderboard
import pytest
import yaml
from jobs import OWN_MINUTES, read_jobs

from robustvlm_lite import cli
from robustvlm_lite.cards import load_card, shelf

ROOT = Path(__file__).resolve().parents[2]
RUN = {"command": "run", "chapter": "01_clip", "profile": "tiny", "seed": [0, 1], "parameters": {"eps_255": [1.0, 2.0]}}
OWN = {"command": "evaluate", "data": "photos/web", "model": ["nano"], "defense": ["none", "TeCoA"], "eps-255": 2, "n": 8}


def test_every_combination_is_one_command_that_parses():
    found = read_jobs({"grid": [RUN, OWN]})
    assert [job.command for job in found.values()] == [
        *(f"run 01_clip --profile tiny --seed {seed} -p eps_255 {eps}" for seed in (0, 1) for eps in (1.0, 2.0)),
        *(f"evaluate --data photos/web --model nano --defense {d} --eps-255 2 -n 8" for d in ("none", "TeCoA")),
    ]
    assert all(cli.parser().parse_args([*job.argv, "--out", "x", "--resume"]).function for job in found.values())
    assert "run_01_clip_profile-tiny_seed-1_eps_255-2.0" in found and len(found) == 6
    assert not any("/" in name for name in found)


def test_a_plan_needs_no_torch():
    """The grid's own environment holds Snakemake alone, and a login node of a cluster has no GPU."""
    grid = {"grid": [RUN | {"parameters": {"device": "cuda"}}, OWN | {"device": "cuda"}]}
    code = f"import sys; sys.modules['torch'] = None; from jobs import read_jobs; print(len(read_jobs({grid!r})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "workflow", capture_output=True, text=True)
    assert done.stdout == "4\n", done.stderr


def test_minutes_and_gpus_follow_the_profile_and_the_device():
    minutes = yaml.safe_load(cli.PROFILES.read_text())["01_clip"]["profiles"]["paper"]["minutes"]
    paper, cuda, own = (
        next(iter(read_jobs({"grid": [entry]}).values()))
        for entry in (RUN | {"profile": "paper"}, RUN | {"parameters": {"device": "cuda"}}, OWN)
    )
    assert (paper.minutes, paper.gpus) == (minutes, 1)
    assert cuda.gpus == 1 and (own.minutes, own.gpus) == (OWN_MINUTES, 0)


@pytest.mark.parametrize(
    "grid, line",
    [
        (None, "expected a list of entries under grid, got None"),
        ([{"command": "train"}], "expected command: run or evaluate in every entry of the grid, got 'train'"),
        ([RUN, RUN], "two entries of the grid make the job run_01_clip_profile-tiny_seed-0_eps_255-1.0"),
        ([RUN | {"chapter": "01_clap"}], "expected a chapter and profile of `robustvlm list`, got 01_clap and tiny"),
        ([RUN | {"profile": "huge"}], "got 01_clip and huge"),
    ],
)
def test_a_grid_that_makes_no_sense_is_one_line(grid, line):
    with pytest.raises(ValueError, match=".") as error:
        read_jobs({"grid": grid})
    assert line in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_option_gets_the_commands_own_line(capsys):
    with pytest.raises(SystemExit):
        read_jobs({"grid": [OWN | {"epsilon": 3}]})
    assert "unrecognized arguments: --epsilon 3" in capsys.readouterr().err


def test_the_shipped_grid_makes_sense():
    config = yaml.safe_load((ROOT / "workflow" / "grid.yml").read_text())
    assert len(read_jobs(config)) == 4


@pytest.mark.skipif(not importlib.util.find_spec("snakemake"), reason="no snakemake in this environment, see book/grid.md")
@pytest.mark.parametrize("executor", ["local", "slurm"])
def test_snakemake_plans_the_shipped_grid(tmp_path, executor):
    if executor == "slurm" and not importlib.util.find_spec("snakemake_executor_plugin_slurm"):
        pytest.skip("no executor plug-in in this environment, see book/grid.md")
    command = [sys.executable, "-m", "snakemake", "--snakefile", "workflow/Snakefile", "--dry-run", "--nolock"]
    command += ["--profile", f"workflow/profiles/{executor}", "--config", f"out={tmp_path}/grid"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"HOME": str(tmp_path)})
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("rule job:") == 4 and "rule leaderboard:" in run.stdout


# ---- the leaderboard


def row(method, value, seed=0, **other):
    place = {"dataset": "d", "attack": "pgd-20", "eps_255": 1.0, "metric": "robust_acc", "n": 10}
    return {"method": method, "value": value, "extra": {"seed": seed}} | place | other


def card(*rows, model="nano", seed=0):
    provenance = {"code_sha256": "other code"}
    return {"chapter": "evaluate", "profile": "own", "seed": seed, "parameters": {"model": model}, "rows": list(rows),
            "provenance": provenance}  # fmt: skip


def test_every_committed_card_has_a_line(monkeypatch):
    """Captioners have no CLIP; a grid over chapters ends in a leaderboard all the same."""
    monkeypatch.setattr(leaderboard, "is_stale", lambda _: False)  # which takes its time
    for path in sorted(shelf().glob("*/card.json")):
        board = leaderboard.gather({path.parent.name: load_card(path.parent)})
        assert all(line["backbone"] for line in board["rows"]), path


def test_one_architecture_with_two_weights_is_two_backbones():
    asked = {"a/x.pt": 0.2, "b/x.pt": 0.4}
    cards = {w: card(row("A", v)) | {"parameters": {"model": "ViT-B-32", "pretrained": w}} for w, v in asked.items()}
    found = {line["backbone"]: line["value"] for line in leaderboard.gather(cards)["rows"]}
    assert found == {"ViT-B-32, a/x.pt": 0.2, "ViT-B-32, b/x.pt": 0.4}


def test_seeds_are_averaged_and_the_best_comes_first():
    cards = {f"s{s}": card(row("A", 0.2, s), row("B", b, s), seed=s) for s, b in ((0, 0.3), (1, 0.5), (2, 0.7))}
    first, second = leaderboard.gather(cards)["rows"]
    assert (first["method"], first["seeds"], first["cards"]) == ("B", 3, ["s0", "s1", "s2"])
    assert (first["value"], first["sd"]) == pytest.approx((0.5, 0.2))  # by hand: deviations of 0.2, 0 and 0.2 over n - 1
    assert (second["value"], second["sd"]) == pytest.approx((0.2, 0.0))


def test_other_sizes_backbones_and_metrics_are_not_mixed():
    cards = {"a": card(row("A", 0.2), row("A", 0.9, n=20), row("A", 0.4, metric="map_iou")), "b": card(row("A", 0.6), model="small")}
    found = leaderboard.gather(cards)["rows"]
    assert sorted((r["backbone"], r["n"], r["value"]) for r in found) == [("nano", 10, 0.2), ("nano", 20, 0.9), ("small", 10, 0.6)]
    assert all(r["sd"] is None for r in found)


def test_a_cell_that_two_cards_measured_counts_once_or_stands_twice():
    same = leaderboard.gather({"a": card(row("A", 0.2)), "b": card(row("A", 0.2))})["rows"]
    assert [(r["value"], r["seeds"], r["cards"]) for r in same] == [(0.2, 1, ["a", "b"])]
    other = leaderboard.gather({"a": card(row("A", 0.2)), "b": card(row("A", 0.3))})["rows"]
    assert [(r["value"], r["cards"]) for r in other] == [(0.3, ["b"]), (0.2, ["a"])]


def test_the_table_tells_spread_staleness_and_escapes():
    text = leaderboard.markdown(leaderboard.gather({"s0": card(row("A|B", 0.25)), "s1": card(row("A|B", 0.75, 1), seed=1)}))
    assert "2 cards. Made by other code than this: s0, s1." in text
    assert "| own | nano | d | pgd-20 | 1 | robust_acc | A\\|B | 50.0 ± 35.4 | 2 | 10 |" in text


def test_the_command_writes_both_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(leaderboard, "load_card", lambda path: card(row("A", 0.5)))
    assert leaderboard.main([str(tmp_path), "job"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["leaderboard.json", "leaderboard.md"]
    assert "1 rows of 1 cards" in capsys.readouterr().out
