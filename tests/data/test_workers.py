"""Loader processes: deaf to the job's signals, gone with their parent, and explained when they die."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from acmix.config import Config
from acmix.data.loader import Data, build_data
from acmix.data.workers import explain_worker_death
from acmix.errors import UserError

MakeConfig = Callable[..., Config]
PATIENCE = 120.0
QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"


@pytest.fixture(params=["workers", "resident"])
def data(request: pytest.FixtureRequest, make_config: MakeConfig) -> Data:
    """Both loaders with processes: a resident one has them where images are changed one by one."""
    settings = {"data__batch_size": 8, "data__num_workers": 2, "data__prefetch_factor": 1}
    return build_data(make_config(**settings, data__loader=request.param, augment__crop="random_resized"))


def worker_pids(data: Data) -> list[int]:
    images: Any = data.train.images
    loader = images.pool._loader
    return [worker.pid for worker in loader._iterator._workers]


def running(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + PATIENCE
    while any(running(pid) for pid in pids):
        assert time.monotonic() < deadline, f"{[pid for pid in pids if running(pid)]} still run"
        time.sleep(0.02)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT"])
def test_signals_meant_for_the_job_do_not_stop_the_workers(name: str, data: Data, report: Callable[..., None]) -> None:
    updates = data.train.epoch(0)
    next(updates)
    for pid in worker_pids(data):
        os.kill(pid, getattr(signal, name))
    assert sum(1 for _ in updates) == data.train.updates_per_epoch - 1
    assert all(running(pid) for pid in worker_pids(data))
    report("signals to loader workers", "workers go on; the job decides when to stop", 2, 2)


def test_signals_do_not_stop_workers_that_are_being_born(make_config: MakeConfig) -> None:
    program = """
import os, signal, sys, threading, time
from acmix.config import load_config
from acmix.data.loader import build_data
caught = []
signal.signal(signal.SIGTERM, lambda number, frame: caught.append(number))
data = build_data(load_config(sys.argv[1], ["data.loader=workers", "data.num_workers=4", "data.batch_size=120"]))
stop = False
def fire():
    while not stop:
        os.killpg(0, signal.SIGTERM)
        time.sleep(0.002)
thread = threading.Thread(target=fire)
thread.start()
count = sum(1 for _ in data.train.epoch(0))
stop = True
thread.join()
print(count == data.train.updates_per_epoch, len(caught) > 0)
"""
    arguments = [sys.executable, "-c", program, str(QUICKSTART)]
    done = subprocess.run(arguments, capture_output=True, text=True, start_new_session=True)
    assert done.stdout.split() == ["True", "True"], done.stderr


@pytest.mark.parametrize("place", ["next batch", "anywhere"])
def test_a_killed_worker_is_explained_with_the_way_out(place: str, data: Data, report: Callable[..., None]) -> None:
    updates = data.train.epoch(0)
    next(updates)
    os.kill(worker_pids(data)[0], signal.SIGKILL)
    if place == "next batch":
        with pytest.raises((UserError, RuntimeError)) as caught:
            for _ in updates:
                pass
        error: BaseException | None = caught.value
    else:
        with pytest.raises((UserError, RuntimeError)) as caught:
            time.sleep(PATIENCE)
        error = caught.value
    if not isinstance(error, UserError):
        error = explain_worker_death(error)
    message = str(error)
    for part in ("memory", "/dev/shm", "data.num_workers", "--resume auto"):
        assert part in message
    report("loader worker killed", "an error that names memory, /dev/shm and the way out", 1, 1)


KEEP_BATCHES = """
import resource, sys
from acmix.config import load_config
from acmix.data.loader import build_data
from acmix.errors import UserError
if sys.argv[2] != "0":
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]),) * 2)
options = ["data.loader=workers", "data.num_workers=2", "data.image_size=192", "data.batch_size=16"]
data = build_data(load_config(sys.argv[1], options))
try:
    kept = list(data.train.epoch(0))
    print(len(kept), "batches", sum(int(batch.images.sum() != 0) for (batch,) in kept))
except UserError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_full_shared_memory_is_worked_around_and_said_once() -> None:
    inside = f"mount -t tmpfs -o size=8m tmpfs /dev/shm && exec {sys.executable} -c '{KEEP_BATCHES}' {QUICKSTART} 0"
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0:
        pytest.skip("a /dev/shm of one's own needs the right to mount")
    done = subprocess.run(["unshare", "--mount", "sh", "-c", inside], capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout == "89 batches 89\n", done.stderr
    assert done.stderr.count("/dev/shm has too little room") == 1
    assert "--shm-size" in done.stderr


@pytest.mark.slow
def test_too_many_open_files_are_an_error_that_says_so() -> None:
    arguments = [sys.executable, "-c", KEEP_BATCHES, str(QUICKSTART), "40"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=PATIENCE)
    assert "too many open files: raise the limit (ulimit -n)" in done.stdout, done.stderr


def test_other_errors_are_not_taken_for_a_dead_worker() -> None:
    assert explain_worker_death(RuntimeError("CUDA out of memory")) is None
    assert explain_worker_death(RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal")) is None
    assert explain_worker_death(ValueError("DataLoader worker (pid 1) is killed by signal: Killed.")) is None


def test_workers_die_with_a_killed_parent(tmp_path: Path) -> None:
    program = """
import sys, time
from acmix.config import load_config
from acmix.data.loader import build_data
data = build_data(load_config(sys.argv[1], ["data.loader=workers", "data.num_workers=2"]))
next(data.train.epoch(0))
next(iter(data.val))
pids = [w.pid for loader in (data.train, data.val) for w in loader.images.pool._loader._iterator._workers]
print(*pids, flush=True)
time.sleep(600)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program, str(QUICKSTART)], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 4
        parent.kill()
        wait_until_gone(pids)


def test_workers_outlive_the_thread_that_started_them(data: Data) -> None:
    updates = data.train.epoch(0)
    starter = threading.Thread(target=next, args=(updates,))
    starter.start()
    starter.join()
    time.sleep(0.2)
    assert sum(1 for _ in updates) == data.train.updates_per_epoch - 1


@pytest.mark.slow
def test_workers_end_with_their_loader_even_one_that_is_stuck(make_config: MakeConfig) -> None:
    data = build_data(make_config(data__batch_size=8, data__num_workers=2))
    next(data.train.epoch(0))
    pids = worker_pids(data)
    os.kill(pids[0], signal.SIGSTOP)
    del data
    wait_until_gone(pids)


def test_workers_start_once_and_serve_every_epoch(data: Data) -> None:
    next(data.train.epoch(0))
    pids = worker_pids(data)
    for epoch in (1, 2):
        assert len(list(data.train.epoch(epoch, start_update=data.train.updates_per_epoch - 3))) == 3
    assert worker_pids(data) == pids


def test_a_pass_that_goes_on_after_a_newer_one_began_is_an_error(data: Data) -> None:
    older, newer = data.train.epoch(0), data.train.epoch(1)
    next(older)
    [batch] = next(newer)
    with pytest.raises(RuntimeError, match="ended when another pass over the same loader began"):
        next(older)
    assert [batch.ids.tolist(), *(batch.ids.tolist() for [batch] in newer)] == [
        plan.indices.tolist() for plan in data.train.order.plans(1, 0, 0)
    ], "the newer one is not touched"


def test_no_more_validation_workers_start_than_there_are_batches(make_config: MakeConfig) -> None:
    data = build_data(make_config(data__num_workers=8, data__val_batch_size=200))
    next(iter(data.val))
    loader: Any = data.val.images.pool._loader
    assert len(loader._iterator._workers) == 2
