"""The jobs of a grid: every combination of the lists in its configuration is one `robustvlm` command with its own folder.

Snakemake reads this again for every job, so nothing heavy is imported.
"""

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

import yaml

from robustvlm_lite import cli

COMMANDS = ("run", "evaluate")
OWN_MINUTES = 60  # for `evaluate`, whose images are not ours to count


@dataclass(frozen=True)
class Job:
    """argv: what follows `robustvlm`, without --out and --resume. minutes: what profiles.yml puts at it, or OWN_MINUTES."""

    argv: tuple[str, ...]
    minutes: int
    gpus: int

    @property
    def command(self) -> str:
        """The arguments, quoted for a shell."""
        return shlex.join(self.argv)


def read_jobs(config: Mapping) -> dict[str, Job]:
    """Name -> job, in the order of the configuration.

    An entry has `command: run` with `chapter` and, under `parameters`, those of the chapter's first cell, or
    `command: evaluate`; everything else in it is an option of that command. A value may be a list.

    Raises ValueError, one line, for what is no grid; a bad option ends the program with the command's own line.
    """
    entries = config.get("grid")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"expected a list of entries under grid, got {entries!r}; see workflow/grid.yml")
    profiles, jobs = yaml.safe_load(cli.PROFILES.read_text(encoding="utf-8")), {}
    for entry in entries:
        for name, job in _combinations(entry, profiles):
            if name in jobs:
                raise ValueError(f"two entries of the grid make the job {name}; remove one")
            jobs[name] = job
    return jobs


def _combinations(entry: Mapping, profiles: Mapping) -> Iterator[tuple[str, Job]]:
    command = entry.get("command")
    if command not in COMMANDS:
        raise ValueError(f"expected command: {' or '.join(COMMANDS)} in every entry of the grid, got {command!r}")
    options = {key: value for key, value in entry.items() if key not in ("command", "parameters")}
    parameters = entry.get("parameters", {})
    keys = [*((key, False) for key in options), *((key, True) for key in parameters)]
    for values in product(*(_listed(value) for value in (*options.values(), *parameters.values()))):
        chosen = [(key, is_parameter, str(value)) for (key, is_parameter), value in zip(keys, values, strict=True)]
        yield _job(command, chosen, profiles)


def _listed(value) -> list:
    return value if isinstance(value, list) else [value]


def _job(command: str, chosen: list[tuple[str, bool, str]], profiles: Mapping) -> tuple[str, Job]:
    words, asked = [command], {key: value for key, _, value in chosen}
    for key, is_parameter, value in chosen:
        if key == "chapter":
            words.append(value)
        else:
            words += ["-p", key, value] if is_parameter else ["-n" if key == "n" else f"--{key}", value]
    cli.parser().parse_args(words)
    minutes = OWN_MINUTES
    if command == "run":
        chapter, profile = asked["chapter"], asked.get("profile", "tiny")
        if profile not in profiles.get(chapter, {}).get("profiles", {}):
            raise ValueError(f"expected a chapter and profile of `robustvlm list`, got {chapter} and {profile}")
        minutes = profiles[chapter]["profiles"][profile]["minutes"]
    gpus = int(asked.get("device") == "cuda" or asked.get("profile") == "paper")
    parts = [value if key == "chapter" else f"{key}-{value}" for key, _, value in chosen]
    return re.sub(r"[^\w.=-]+", "-", "_".join([command, *parts])), Job(tuple(words), minutes, gpus)
