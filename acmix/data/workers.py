"""Loader processes: how they start and end, which signals they ignore, and what is reported when one dies."""

import math
import signal
import sys
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from acmix.config import Config
from acmix.cores import cores_per_process
from acmix.data.orphans import die_with_parent
from acmix.data.sampler import BatchPlan
from acmix.errors import UserError

_JOB_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
_MEMORY = (
    "Likely causes: the machine ran out of memory (the kernel's log says so), or /dev/shm is full or too small. Lower "
    "data.num_workers, data.prefetch_factor or data.batch_size, or give the container more shared memory (docker "
    "--shm-size), and continue with --resume auto"
)
_OPEN_FILES = (
    "too many open files: raise the limit (ulimit -n) or lower data.num_workers or data.prefetch_factor, and continue "
    "with --resume auto"
)


_MOST_WITH_GPU, _MOST_ON_CPU = 16, 4


class PlanQueue:
    """The sampler of a loader: set `plans` before each pass."""

    def __init__(self) -> None:
        self.plans: Iterator[BatchPlan] = iter(())

    def __iter__(self) -> Iterator[BatchPlan]:
        return self.plans


class WorkerPool:
    """A DataLoader that turns BatchPlans into what `dataset[plan]` returns, in order.

    Its processes start at the first pass and end when the pool is dropped or the program exits. They ignore the
    signals meant for the job, so that it can stop gracefully, and die with their parent.
    """

    def __init__(self, dataset: Dataset, config: Config, workers: int) -> None:
        pin = config.data.pin_memory
        self._queue = PlanQueue()
        with _many_workers_allowed():
            self._loader: DataLoader = DataLoader(
                dataset,
                batch_size=None,
                sampler=self._queue,
                collate_fn=_as_it_is,
                num_workers=workers,
                persistent_workers=workers > 0,
                prefetch_factor=config.data.prefetch_factor if workers else None,
                pin_memory=on_gpu(config) if pin is None else pin,
                worker_init_fn=_start_worker,
                generator=torch.Generator(),  # else each pass would draw from the global one
            )
        self.close = weakref.finalize(self, _stop_workers, self._loader)
        """End the processes now. A pool that is closed is not used again."""

    def run(self, plans: Iterator[BatchPlan]) -> Iterator[Any]:
        """Results of the plans, in order. Raises UserError when a worker dies."""
        self._queue.plans = plans
        with worker_deaths_explained():
            with _job_signals_blocked(), _many_workers_allowed():
                results = iter(self._loader)
            yield from results


@contextmanager
def worker_deaths_explained() -> Iterator[None]:
    """Turns PyTorch's report of a dead loader worker into a UserError."""
    try:
        yield
    except RuntimeError as error:
        raise explain_worker_death(error) or error from None


def explain_worker_death(error: BaseException) -> UserError | None:
    """The message for the user when PyTorch reports that a loader worker died; None for any other error.

    PyTorch raises its report from a signal handler, so it may surface at any line of the main process.
    """
    text = " ".join(str(error).split())
    if not isinstance(error, RuntimeError) or "Caught" in text:
        return None
    if text.startswith("Too many open files"):
        return UserError(f"{_OPEN_FILES} ({text.partition('.')[0]})")
    if "DataLoader worker" not in text:
        return None
    return UserError(f"a data loader worker died ({text}). {_MEMORY}")


def blank_pixels(*shape: int) -> torch.Tensor | np.ndarray:
    """Zeros (uint8) for what this process is to return: in a loader process in shared memory, which the main process
    reads without a copy.

    Where there is too little of that, an array, which goes through the pipe. Raises UserError.
    """
    if not in_worker():
        return torch.zeros(shape, dtype=torch.uint8)
    try:
        shared = torch.UntypedStorage._new_shared(math.prod(shape))  # as torch's own collate function has it
    except RuntimeError as error:
        if "open files" in str(error):
            raise UserError(f"{_OPEN_FILES} ({error})") from None
        return np.zeros(shape, dtype=np.uint8)
    return torch.empty(0, dtype=torch.uint8).set_(shared, 0, shape)  # type: ignore[call-overload]


def hand_over(pixels: torch.Tensor) -> torch.Tensor | np.ndarray:
    """The tensor (uint8) as this process is to return it, like `blank_pixels`. Raises UserError."""
    if not in_worker():
        return pixels
    shared = blank_pixels(*pixels.shape)
    return shared.copy_(pixels) if isinstance(shared, torch.Tensor) else pixels.numpy()


@cache
def warn_of_little_shared_memory() -> None:
    """Said once, when the first batch comes through the pipe."""
    print(
        "warning: /dev/shm has too little room for the batches of the loader processes; they come through a pipe, more "
        "slowly. Give the container more shared memory (docker --shm-size), or lower data.prefetch_factor",
        file=sys.stderr,
        flush=True,
    )


def worker_count(config: Config) -> int:
    """`data.num_workers`; with `auto`, as many as leave the training process the cores it needs: all but one of its own
    with a GPU, up to 16, and half of them on the CPU, up to 4."""
    if config.data.num_workers != "auto":
        return config.data.num_workers
    cores = cores_per_process()
    return max(1, min(cores - 1, _MOST_WITH_GPU)) if on_gpu(config) else min(cores // 2, _MOST_ON_CPU)


def on_gpu(config: Config) -> bool:
    """Whether the run trains on a GPU."""
    return torch.cuda.is_available() and config.run.device != "cpu"


def in_worker() -> bool:
    """Whether this is a loader process."""
    return get_worker_info() is not None


def _as_it_is(batch: Any) -> Any:
    return batch


def _start_worker(_: int) -> None:
    for number in _JOB_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _JOB_SIGNALS)
    die_with_parent()


@contextmanager
def _many_workers_allowed() -> Iterator[None]:
    """Without the warning of more workers than cores."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        yield


@contextmanager
def _job_signals_blocked() -> Iterator[None]:
    """Protects workers between their fork and `_start_worker`, where a signal meant for the job would kill them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _JOB_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _stop_workers(loader: DataLoader) -> None:
    iterator: Any = getattr(loader, "_iterator", None)
    workers = list(getattr(iterator, "_workers", ()))
    if workers:
        iterator._shutdown_workers()
    for worker in workers:
        if worker.is_alive():  # stuck in a read; it ignores SIGTERM, for which Python would wait at exit
            worker.kill()
    loader._iterator = None
