"""Loader processes: how they start and end, which signals they ignore, and what is reported when one dies."""

import math
import signal
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from acmix.config import Config
from acmix.cores import cores_per_process
from acmix.data.orphans import helpers_first_call
from acmix.data.sampler import BatchPlan
from acmix.data.shared import OPEN_FILES, Slots, Slotted, forks
from acmix.errors import UserError

_JOB_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
_MEMORY = (
    "Likely causes: the machine ran out of memory (the kernel's log says so), or /dev/shm is full or too small. Lower "
    "data.num_workers, data.prefetch_factor or data.batch_size, or give the container more shared memory (docker "
    "--shm-size), and continue with --resume auto"
)

_MOST_WITH_GPU, _MOST_ON_CPU = 16, 4


class PlanQueue:
    """The sampler of a loader: set `plans` before each pass."""

    def __init__(self) -> None:
        self.plans: Iterator[Any] = iter(())

    def __iter__(self) -> Iterator[Any]:
        return self.plans


class WorkerPool:
    """A DataLoader that turns BatchPlans into what `dataset[plan]` returns, a named tuple with `pixels`, in order.

    size: bytes of the pixels of the largest result; of a batch of the config where it is not given

    Its processes start at the first pass and end when the pool is dropped or the program exits. They ignore the
    signals meant for the job, so that it can stop gracefully, and die with their parent.
    """

    def __init__(self, dataset: Dataset, config: Config, workers: int, size: int | None = None) -> None:
        pin = on_gpu(config) if config.data.pin_memory is None else config.data.pin_memory
        self._queue = PlanQueue()
        self._passes = 0
        self._slots: Slots | None = None
        if workers and not pin and forks():  # what is pinned is copied on arrival
            # all that may be under way, one more, and those of the updates before and at hand
            count = workers * config.data.prefetch_factor + 1 + 2 * config.optimizer.accumulate
            self._slots = Slots(count, size or _batch_bytes(config))
            dataset = Slotted(dataset, self._slots)
        with _many_workers_allowed():
            self._loader: DataLoader = DataLoader(
                dataset,
                batch_size=None,
                sampler=self._queue,
                collate_fn=_as_it_is,
                num_workers=workers,
                persistent_workers=workers > 0,
                prefetch_factor=config.data.prefetch_factor if workers else None,
                pin_memory=pin,
                generator=torch.Generator(),  # else each pass would draw from the global one
            )
        self.close = weakref.finalize(self, _stop_workers, self._loader, self._slots)
        """End the processes now. A pool that is closed is not used again."""

    def run(self, plans: Iterator[BatchPlan]) -> Iterator[Any]:
        """Results of the plans, in order; a new pass ends the one before.

        Raises UserError when a worker dies, RuntimeError when a pass is asked for more after a newer one began.
        """
        slots = self._slots
        self._passes += 1
        number = self._passes
        self._queue.plans = plans if slots is None else slots.assigned(plans)
        with worker_deaths_explained():
            # the processes start here, in whichever thread this is
            self._loader.worker_init_fn = partial(_start_worker, first_call=helpers_first_call())
            with _job_signals_blocked(), _many_workers_allowed():
                results = iter(self._loader)
            for result in results if slots is None else map(slots.taken, results):
                yield result
                if number != self._passes and self._loader.num_workers:  # both would be given the same results
                    raise RuntimeError(
                        "these batches ended when another pass over the same loader began: its processes serve one "
                        "pass at a time; finish a pass before the next, or set data.num_workers=0"
                    )


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
        return UserError(f"{OPEN_FILES} ({text.partition('.')[0]})")
    if "DataLoader worker" not in text:
        return None
    return UserError(f"a data loader worker died ({text}). {_MEMORY}")


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


def _batch_bytes(config: Config) -> int:
    images = max(config.data.batch_size, config.data.val_batch_size or 0)
    return images * math.prod(config.data.size) * config.model.in_chans


def _as_it_is(batch: Any) -> Any:
    return batch


def _start_worker(_: int, first_call: Callable[[], None]) -> None:
    for number in _JOB_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _JOB_SIGNALS)
    first_call()  # where it does nothing, PyTorch looks every few seconds whether the parent is there


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


def _stop_workers(loader: DataLoader, slots: Slots | None) -> None:
    iterator: Any = getattr(loader, "_iterator", None)
    workers = list(getattr(iterator, "_workers", ()))
    if workers:
        iterator._shutdown_workers()
    for worker in workers:
        if worker.is_alive():  # stuck in a read; it ignores SIGTERM, for which Python would wait at exit
            worker.kill()
    loader._iterator = None
    if slots is not None:
        slots.close()
