"""Work on all cores at once, one process each with one thread: small models leave torch's threads waiting for each other."""

import multiprocessing
import os
import pickle
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial

import torch
from tqdm import tqdm

from ..runtime import UserError

MOST = 4  # processes; each holds its own activations
_jobs: Sequence[Callable] = ()  # what forked processes inherit


def processes(run, n_jobs: int) -> int:
    """How many share `n_jobs`: one on a GPU, inside a process of another, and where a process cannot fork safely."""
    alone = run.device.type != "cpu" or _jobs or sys.platform != "linux"
    return 1 if alone else min(len(os.sched_getaffinity(0)), MOST, n_jobs)


def spread(run, jobs: Sequence[Callable[[], object]], what: str) -> list:
    """What each job returns, in order. On a CPU each core takes the next one, in a forked process; on a GPU they run here.

    A job reads what is in memory and returns what can be pickled. What else it changes is lost, files aside, so no job may
    need another's. Raises what the first failing job raised; UserError if a process was killed.
    """
    global _jobs
    workers = processes(run, len(jobs))
    if workers <= 1:
        return [job() for job in tqdm(jobs, desc=what, unit="job", leave=False)]
    _jobs, context = jobs, multiprocessing.get_context("fork")
    try:
        with ProcessPoolExecutor(workers, context, _alone) as pool:
            done = [pool.submit(_do, k) for k in range(len(jobs))]
            try:
                return [pickle.loads(d.result()) for d in tqdm(done, desc=what, unit="job", leave=False)]
            finally:
                pool.shutdown(cancel_futures=True)
    except BrokenProcessPool:
        raise UserError(f"{what}: a process was killed, most likely for memory; free some, then run again with --resume") from None
    finally:
        _jobs = ()


def beforehand(run, jobs: Sequence[Callable[[], object]], what: str) -> None:
    """Does on all cores what leaves its result in the run's folder, where whoever asks next finds it; nothing with one process."""
    if processes(run, len(jobs)) > 1:
        spread(run, [partial(_dropped, job) for job in jobs], what)


def _dropped(job: Callable[[], object]) -> None:
    job()


def _alone() -> None:
    """A forked process keeps to one thread, is silent, and inherits no lock that another thread may have held."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (as long as the process)
    tqdm.set_lock(threading.RLock())


def _do(k: int) -> bytes:
    return pickle.dumps(_jobs[k]())  # plain bytes: tensors would travel through shared memory, which containers lack
