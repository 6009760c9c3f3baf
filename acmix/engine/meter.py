"""Speed of training since the last logged row: images a second, waiting for data, memory, time left."""

import math
import resource
import time
from collections.abc import Iterable, Iterator
from typing import TypedDict, TypeVar

import torch

Item = TypeVar("Item")


class Speed(TypedDict):
    """images_per_second over all ranks; data_wait 0 to 1; memory_gib: peak of this process; eta_seconds to the end."""

    images_per_second: float
    data_wait: float
    memory_gib: float
    eta_seconds: float


class Meter:
    """Times steps; evaluations and saves are left out by calling `restart` after them.

    Args:
        global_batch: images per step over all ranks.
        device: where the model is, for the memory figure.
    """

    def __init__(self, global_batch: int, device: torch.device) -> None:
        self.global_batch = global_batch
        self.device = device
        self.epoch_wait = 0.0
        """Share of the time since the first item of the last `timed` that was waiting, 0 to 1."""
        self.restart()

    def restart(self) -> None:
        """Begin a new window now."""
        self._since = time.perf_counter()
        self._waited = 0.0
        self._steps = 0

    def timed(self, items: Iterable[Item]) -> Iterator[Item]:
        """Pass items on, counting the time it takes to get each as waiting for data."""
        source = iter(items)
        began, waited = math.inf, 0.0
        while True:
            before = time.perf_counter()
            try:
                item = next(source)
            except StopIteration:
                return
            now = time.perf_counter()
            self._waited += now - before
            if began == math.inf:  # loader processes start with the first item
                began = now
            else:
                waited += now - before
                self.epoch_wait = waited / (now - began)
            yield item

    def count(self) -> None:
        """Count a step."""
        self._steps += 1

    def read(self, steps_left: int) -> Speed:
        """The figures of this window, which ends here."""
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        seconds_per_step = elapsed / max(self._steps, 1)
        speed = Speed(
            images_per_second=round(self._steps * self.global_batch / elapsed, 3),
            data_wait=round(self._waited / elapsed, 4),
            memory_gib=round(self._peak_bytes() / 2**30, 3),
            eta_seconds=round(steps_left * seconds_per_step, 1),
        )
        self.restart()
        return speed

    def _peak_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
