"""Work spread over processes gives what one process gives, in order, and fails as loudly."""

import os
import signal
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from robustvlm_lite.book import spread as module
from robustvlm_lite.book.spread import beforehand, processes, spread
from robustvlm_lite.runtime import UserError

CPU = SimpleNamespace(device=torch.device("cpu"))
GPU = SimpleNamespace(device=torch.device("cuda"))

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})


def test_results_come_in_order_from_processes_other_than_this():
    def slow_first(k):
        time.sleep(0.3 if k == 0 else 0)
        return k, os.getpid(), torch.get_num_threads()

    found = spread(CPU, [partial(slow_first, k) for k in range(4)], "counting")
    assert [k for k, _, _ in found] == [0, 1, 2, 3]
    assert os.getpid() not in {pid for _, pid, _ in found} and {threads for *_, threads in found} == {1}


def test_jobs_see_what_is_in_memory_and_tensors_come_back_whole():
    weights = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    layer = torch.nn.Linear(300, 300)

    def gradient(k):
        x = weights[k : k + 8].clone().requires_grad_()
        return torch.autograd.grad(layer(x).pow(2).sum(), x)[0]

    found = spread(CPU, [partial(gradient, k) for k in range(3)], "gradients")
    for k, got in enumerate(found):
        torch.testing.assert_close(got, gradient(k), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("run", [CPU, GPU])
def test_the_first_error_is_raised_as_it_was(run):
    def job(k):
        if k:
            raise UserError(f"expected less than {k}")
        return k

    with pytest.raises(UserError, match="^expected less than 1$"):
        spread(run, [partial(job, k) for k in range(3)], "failing")
    assert spread(run, [partial(job, 0)] * 2, "again") == [0, 0]


def test_a_killed_process_is_named():
    with pytest.raises(UserError, match="tuning: a process was killed, most likely for memory.*--resume"):
        spread(CPU, [partial(os.kill, 0, 0), lambda: os.kill(os.getpid(), signal.SIGKILL)], "tuning")


def test_on_a_gpu_and_inside_a_process_one_does_all(monkeypatch):
    assert processes(GPU, 4) == 1 and processes(CPU, 4) == 2 and processes(CPU, 1) == 1
    assert spread(GPU, [os.getpid] * 2, "here") == [os.getpid()] * 2
    assert spread(CPU, [lambda: processes(CPU, 4)] * 2, "inside") == [1, 1]
    monkeypatch.setattr(module.sys, "platform", "darwin")
    assert processes(CPU, 4) == 1


def test_beforehand_leaves_files_and_does_nothing_where_it_would_not_help(tmp_path):
    def job(name):
        (tmp_path / name).write_text(str(os.getpid()))
        return lambda: "cannot be pickled"

    beforehand(GPU, [partial(job, "c")], "writing")
    beforehand(CPU, [partial(job, name) for name in "ab"], "writing")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    assert str(os.getpid()) not in {p.read_text() for p in tmp_path.iterdir()}
