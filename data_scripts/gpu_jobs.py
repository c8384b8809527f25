"""Print what still needs a GPU: the rows of gpu_jobs.yml that are not done."""

from pathlib import Path

import yaml

JOBS = Path(__file__).with_name("gpu_jobs.yml")
FIELDS = {
    "id": str,
    "what": str,
    "command": str,
    "machine": str,
    "minutes": int,
    "basis": str,
    "inputs": str,
    "returns": str,
    "done": bool,
}


def problems(jobs: list[dict]) -> list[str]:
    """What is wrong with the list: a missing, unknown or mistyped field, a repeated id."""
    found = []
    for n, job in enumerate(jobs):
        name = job.get("id", f"row {n}")
        found += [f"{name}: {field} is missing" for field in FIELDS if field not in job]
        found += [f"{name}: unknown field {field}" for field in job if field not in FIELDS]
        found += [
            f"{name}: {f} should be {t.__name__}, got {job[f]!r}"
            for f, t in FIELDS.items()
            if f in job and type(job[f]) is not t
        ]
    ids = [job.get("id") for job in jobs]
    return found + [f"{i}: used twice" for i in sorted({i for i in ids if i and ids.count(i) > 1})]


def main() -> None:
    jobs = yaml.safe_load(JOBS.read_text(encoding="utf-8"))
    if found := problems(jobs):
        raise SystemExit("\n".join(found))
    open_jobs = [job for job in jobs if not job["done"]]
    print(f"{len(open_jobs)} of {len(jobs)} jobs open, {sum(job['minutes'] for job in open_jobs)} minutes in all")
    for job in open_jobs:
        print(f"\n{job['id']} · {job['machine']}, {job['minutes']} min ({job['basis']})\n  {job['what']}")
        print(f"  $ {job['command']}\n  needs {job['inputs']}\n  gives {job['returns']}")


if __name__ == "__main__":
    main()
