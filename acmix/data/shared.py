"""Memory through which loader processes hand pixels over, made once and used again.

Fresh shared memory for each batch costs a loader process a third as much as decoding small images: the system clears
every page of it, and maps it into two processes.
"""

import math
import mmap
import multiprocessing
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from acmix.errors import UserError

OPEN_FILES = (
    "too many open files: raise the limit (ulimit -n) or lower data.num_workers or data.prefetch_factor, and continue "
    "with --resume auto"
)


class Slot(NamedTuple):
    """Where a loader process left pixels: number of the slot and shape of what it holds."""

    number: int
    shape: tuple[int, ...]


class Slots:
    """Memory that processes forked after its making share, in `count` slots of `size` bytes.

    A slot belongs to a plan from when that is sent until the tensor made of the slot is gone from this process.
    """

    def __init__(self, count: int, size: int) -> None:
        self.rows = np.frombuffer(mmap.mmap(-1, count * size), dtype=np.uint8).reshape(count, size)
        self._free = list(range(count))
        self._sent: set[int] = set()

    def assigned(self, plans: Iterable[Any]) -> Iterator[tuple[Any, int | None]]:
        """Each plan with a slot, or with None while all are in use. What was sent in a pass before and not taken since
        is given up."""
        self._free += self._sent
        self._sent.clear()
        for plan in plans:
            number = self._free.pop() if self._free else None
            if number is not None:
                self._sent.add(number)
            yield plan, number

    def taken(self, result: Any) -> Any:
        """What a loader process returned, a named tuple, with a tensor for its pixels where those are in a slot."""
        slot = result.pixels
        if not isinstance(slot, Slot):
            return result
        self._sent.discard(slot.number)
        # views of the tensor keep this array; when the last is gone, the slot is free
        lent = self.rows[slot.number, : math.prod(slot.shape)].reshape(slot.shape)
        weakref.finalize(lent, self._free.append, slot.number).atexit = False
        return result._replace(pixels=torch.from_numpy(lent))

    def close(self) -> None:
        """Give the memory back, but for what is still lent."""
        self.rows = self.rows[:0].copy()


class Slotted(Dataset):
    """A dataset that finds in a slot what `room_for` gives out: (plan, number of the slot) → what `dataset[plan]` is,
    with a Slot for its pixels."""

    def __init__(self, dataset: Dataset, slots: Slots) -> None:
        self._dataset = dataset
        self._slots = slots

    def __getitem__(self, assigned: tuple[Any, int | None]) -> Any:
        global _room
        plan, number = assigned
        _room = None if number is None else self._slots.rows[number]
        result = self._dataset[plan]
        if _room is None or not isinstance(result.pixels, Tensor) or result.pixels.data_ptr() != _room.ctypes.data:
            return result
        return result._replace(pixels=Slot(int(number or 0), tuple(result.pixels.shape)))


_room: np.ndarray | None = None
"""In a loader process, the slot of the plan at hand."""


def forks() -> bool:
    """Whether loader processes are forked, and so share what is mapped here."""
    return (multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]) == "fork"


def room_for(shape: Sequence[int]) -> Tensor | np.ndarray:
    """Memory (uint8, its values undefined) for what this process is to return: in a loader process a slot, or else
    fresh shared memory, which the main process reads without a copy.

    Where there is too little of that, an array, which goes through the pipe. Raises UserError.
    """
    shape, size = tuple(shape), math.prod(shape)
    if not in_worker():
        return torch.empty(shape, dtype=torch.uint8)
    if _room is not None and size <= len(_room):
        return torch.from_numpy(_room[:size].reshape(shape))
    try:
        shared = torch.UntypedStorage._new_shared(size)  # as torch's own collate function has it
    except RuntimeError as error:
        if "open files" in str(error):
            raise UserError(f"{OPEN_FILES} ({error})") from None
        return np.empty(shape, dtype=np.uint8)
    return torch.empty(0, dtype=torch.uint8).set_(shared, 0, shape)  # type: ignore[call-overload]


def hand_over(pixels: Tensor) -> Tensor | np.ndarray:
    """The tensor (uint8) as this process is to return it, like `room_for`. Raises UserError."""
    if not in_worker():
        return pixels
    room = room_for(pixels.shape)
    return room.copy_(pixels) if isinstance(room, Tensor) else pixels.numpy()


@cache
def warn_of_little_shared_memory() -> None:
    """Said once, when the first batch comes through the pipe."""
    print(
        "warning: /dev/shm has too little room for the batches of the loader processes; they come through a pipe, more "
        "slowly. Give the container more shared memory (docker --shm-size), or lower data.prefetch_factor",
        file=sys.stderr,
        flush=True,
    )


def in_worker() -> bool:
    """Whether this is a loader process."""
    return get_worker_info() is not None
