"""The list of what still needs a GPU is complete and printable."""

import gpu_jobs
import yaml

JOB = {field: kind() for field, kind in gpu_jobs.FIELDS.items()}


def test_committed_list_is_sound(capsys):
    jobs = yaml.safe_load(gpu_jobs.JOBS.read_text(encoding="utf-8"))
    assert gpu_jobs.problems(jobs) == []
    gpu_jobs.main()
    printed = capsys.readouterr().out
    assert all((job["command"] in printed) == (not job["done"]) for job in jobs)


def test_faults_are_named():
    assert gpu_jobs.problems([JOB]) == []
    bad = {k: v for k, v in JOB.items() if k != "inputs"} | {"id": "a", "minutes": "ten", "gpu": 1}
    assert gpu_jobs.problems([bad, bad])[:3] == [
        "a: inputs is missing",
        "a: unknown field gpu",
        "a: minutes should be int, got 'ten'",
    ]
    assert gpu_jobs.problems([bad, bad])[-1] == "a: used twice"
