"""The `robustvlm` command.

torch, open_clip and papermill take seconds to import: only the commands that need them import the rooms that do.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

PROFILES = Path(__file__).parent / "assets" / "profiles.yml"
MAIN_METRICS = ("clean_acc", "robust_acc", "robust_acc_worst")
MAX_ROWS = 24  # of a printed table


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaint is one line, like every other error of the book."""

    def error(self, message: str):
        self.exit(2, f"robustvlm: {message}; see {self.prog} --help\n")


def parser() -> Parser:
    """The command line with its help."""
    top = Parser(prog="robustvlm", description="Reproduce, attack and compare published defenses of CLIP.")
    top.epilog = "Begin with: robustvlm run 04_tga_zsr"
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    def command(function, name: str, help: str, example: str, to=commands) -> Parser:
        sub = to.add_parser(
            name,
            help=help,
            description=help,
            epilog=f"example: robustvlm {example}",
        )
        sub.set_defaults(function=function)
        return sub

    command(_list, "list", "chapters, what each reproduces, its time and memory by profile", "list")

    run = command(_run, "run", "execute a chapter and write its result card", "run 04_tga_zsr -p eps_255 2 --seed 1")
    run.add_argument("chapter", metavar="CHAPTER", help="a name that `robustvlm list` shows")
    run.add_argument("--profile", default="tiny", help="tiny (the default, for a laptop), small (real images) or paper")
    run.add_argument(
        *("-p", "--parameter"),
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="set a parameter of the chapter's first cell, as in -p eps_255 2 (ε in 1/255); may be repeated",
    )
    _add_run_options(run)

    data = commands.add_parser("data", help="data sets by name").add_subparsers(metavar="COMMAND", required=True)
    listed = command(_data_list, "list", "every data set: where it is, its size and licence", "data list", to=data)
    listed.add_argument("--data-root", default="", metavar="DIR", help="folder that holds stl10/, cifar10/ …, full/")
    example = "data prepare food101 --root data/"
    prepared = command(_data_prepare, "prepare", "fetch a data set, and check it", example, to=data)
    prepared.add_argument("name", metavar="NAME", help="of `robustvlm data list`; small/NAME makes a 64-pixel pack again")
    prepared.add_argument("--root", required=True, metavar="DIR", help="the data root: files come to DIR/full/NAME, a pack to DIR/NAME")

    example = "evaluate --data my_images/ --defense TeCoA --attack pgd --eps-255 2 -n 200"
    own = command(_evaluate, "evaluate", "your own images and checkpoint, clean and under attack", example)
    _add_evaluate_options(own)
    _add_run_options(own)

    claims = command(_claims, "claims", "the papers' claims, our verdicts, the cards behind them", "claims --check")
    claims.add_argument("--check", action="store_true", help="compute verdicts and accuracies anew from the examples")

    doctor = command(_doctor, "doctor", "what is installed, what is missing, and the mend", "doctor")
    doctor.add_argument("--data-root", default="", metavar="DIR", help="also look at the packs of this folder")
    return top


def _add_run_options(sub: Parser) -> None:
    sub.add_argument("--seed", type=int, default=0, help="subset, attack starts and training derive from it (0)")
    sub.add_argument("--out", default="runs", metavar="DIR", help="where the run's own folder is made (%(default)s)")
    sub.add_argument("--resume", action="store_true", help="keep what a killed run of the same command had finished")


def _add_evaluate_options(sub: Parser) -> None:
    sub.add_argument(
        "--data",
        required=True,
        metavar="DIR",
        help="one subfolder a class, or Parquet in the Hugging Face image layout with classes.json (its test split), "
        "or a name of `robustvlm data list`",
    )
    sub.add_argument("--data-root", default="", metavar="DIR", help="folder that holds a pack given by name")
    sub.add_argument("--model", default="nano", help="a CLIP that doctor lists, or an open_clip architecture (%(default)s)")
    sub.add_argument("--pretrained", default="", metavar="PATH", help="its weights: a file, or a tag of open_clip")
    sub.add_argument(
        "--defense",
        default="none",
        help="none (the default), a name from the glossary of the book (TGA-ZSR, R-TPT …), or the path of a checkpoint. Methods at "
        "test time cost an image more passes of the image tower: TTC 4, and 2 backward; View ensemble, MTA, TPT, TPT-Ensemble, "
        "C-TPT and R-TPT 64; A-TPT (as reported) 72, and 8 backward; A-TPT (released) 127, and 63 backward. All that tune a "
        "prompt also take 2 passes of the text tower over all classes, one of them backward as well. The attacker knows the "
        "defense and sees through 9 views a step",
    )
    sub.add_argument("--attack", default="pgd", help="pgd (the default), cw, apgd-ce, autoattack, square, noise …")
    sub.add_argument("--eps-255", type=float, default=1.0, metavar="ε", help="budget in 1/255, ℓ∞ (%(default)s)")
    sub.add_argument("--steps", type=int, metavar="N", help="steps of the attack; left out: 20 for pgd, else its own")
    sub.add_argument("-n", type=int, metavar="N", help="images, balanced over classes; left out: up to 500")
    sub.add_argument("--device", default="", metavar="NAME", help="cpu or cuda; left out: cuda where there is one")


# ---- commands


def _list(_) -> None:
    import yaml

    for name, chapter in yaml.safe_load(PROFILES.read_text(encoding="utf-8")).items():
        print(f"{name}  {chapter['title']}\n    {chapter['reproduces']}")
        for profile, sizes in chapter["profiles"].items():
            minutes, estimated = sizes["minutes"], sizes.get("estimated", ())
            took = f"{minutes} min" if minutes <= 180 else f"{minutes / 60:.0f} h"
            cost = {"minutes": took, "memory_gb": f"{sizes['memory_gb']:g} GB"}
            took, memory = (f"~{text}" if field in estimated else text for field, text in cost.items())
            print(f"    {profile:6} {took:>7} {memory:>8}  {sizes['where']}")
    print("time, peak memory of the largest process; ~ is an estimate, the rest was measured")


def _run(args) -> None:
    from .runner import run_chapter
    from .runtime import UserError

    names = [name for name, _ in args.parameter]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"parameter {min(twice)} is given twice; give it once")
    card = run_chapter(
        args.chapter,
        profile=args.profile,
        parameters=dict(args.parameter),
        seed=args.seed,
        out=args.out,
        resume=args.resume,
    )
    _report(card, args.began)


def _check_device(name: str) -> None:
    """That tensors can be made there: torch knows names of many devices that it was not built for.

    Not the parser's work, which also reads jobs of a grid, where torch or the job's GPU need not be.
    """
    import torch

    from .runtime import UserError, resolve_device

    device = resolve_device(name)
    try:
        torch.empty(0, device=device)
    except Exception as error:  # each backend has an error of its own
        reason = str(error).splitlines()[0]
        raise UserError(f"--device: expected a device of this machine, cpu or cuda, got {name!r} ({reason})") from None


def _evaluate(args) -> None:
    from .practitioner import evaluate_own

    _check_device(args.device)
    options = {k: v for k, v in vars(args).items() if k not in ("function", "began", "steps")}
    if args.steps is not None:
        options["attack"] = f"{args.attack}-{args.steps}"
    _report(evaluate_own(**options), args.began)


def _data_list(args) -> None:
    from .data.inventory import HEADER, inventory

    _print_table(HEADER, inventory(args.data_root))


def _data_prepare(args) -> int:
    from .data.prepare import prepare, report
    from .data.rebuild import rebuild
    from .data.registry import find

    if args.name.startswith("small/"):
        return _rebuilt(args.name, rebuild(args.name, args.root))
    dataset = find(args.name)
    print(f"{dataset.title}: {dataset.licence}")
    folder = prepare(args.name, args.root)
    lines, whole = report(dataset, args.root)
    print("\n".join([f"{dataset.title} is in {folder}", *lines]))
    return 0 if whole else 1


def _rebuilt(name: str, folder: Path) -> int:
    from .data import PACKS, read_rows

    counts = {split: len(read_rows(folder, split)[2]) for split in ("train", PACKS[name].test_split)}
    print(f"{name} is in {folder}: " + ", ".join(f"{n} {split}" for split, n in counts.items()) + f"; {PACKS[name].licence}")
    return 0


def _claims(args) -> int:
    from .cards import committed, shelf
    from .verdicts import book_verdicts, contradictions

    cards = committed()
    for v in book_verdicts(cards):
        source = f"book/cards/{v.card}/card.json{', stale' if v.stale else ''}" if v.card else v.why
        print(f"{v.claim['id']}  {v.verdict}  ({source})\n    {v.claim['statement']} [{v.claim['where']}]")
    if not args.check:
        return 0
    problems = [problem for name in cards for problem in contradictions(shelf() / name)]
    print("\n".join(problems) or f"{len(cards)} cards: every verdict and accuracy follows from the examples")
    return 1 if problems else 0


def _doctor(args) -> int:
    from .doctor import examine

    return examine(args.data_root)


# ---- what a finished run shows


def _report(path: Path, began: float) -> None:
    """Print a card's main rows: clean, and at the card's own budget where it states one."""
    from .cards import load_card

    card = load_card(path)
    budget = card["parameters"].get("eps_255")
    rows = [row for row in card["rows"] if row["metric"] in MAIN_METRICS]
    rows = [row for row in rows if not budget or row["eps_255"] in (0.0, budget)]
    lines = []
    for row in rows[:MAX_ROWS]:
        value, (low, high) = row["value"], row["ci95"]
        accuracy = f"{100 * value:5.1f}  [{100 * low:.1f}, {100 * high:.1f}]"
        lines.append((row["dataset"], row["method"], row["attack"], f"{row['eps_255']:g}", str(row["n"]), accuracy))
    _print_table(("data set", "method", "attack", "ε·255", "n", "accuracy % [95 %]"), lines)
    left = len(card["rows"]) - len(lines)
    print(f"{path}" + (f" ({left} more rows)" if left else ""))
    print(f"{time.monotonic() - began:.0f} s")


def _print_table(header: tuple[str, ...], lines: list[tuple[str, ...]]) -> None:
    widths = [max(len(cell) for cell in column) for column in zip(header, *lines, strict=True)]
    for line in (header, *lines):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def guarded(function: Callable[[], int | None]) -> int:
    """Exit code of a command. Bad input (2) and a stopped chapter (1) become one line on stderr; a bug is raised."""
    try:
        return function() or 0
    except KeyboardInterrupt:
        print("robustvlm: stopped; the same command goes on, run and evaluate with --resume", file=sys.stderr)
        return 130
    except Exception as error:
        from .runner import RunError
        from .runtime import UserError

        if not isinstance(error, RunError | UserError):
            raise
        print("robustvlm:", " ".join(str(error).splitlines()), file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1


def main(argv: list[str] | None = None) -> int:
    """Run one command. 0: done; 1: it ran and something is wrong; 2: bad input, one line on stderr; 130: stopped."""
    args = parser().parse_args(argv)
    args.began = time.monotonic()
    return guarded(lambda: args.function(args))


if __name__ == "__main__":
    sys.exit(main())
