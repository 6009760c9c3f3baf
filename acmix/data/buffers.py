"""Memory for batches that is used again: fresh memory from the system costs more than the arithmetic done in it."""

import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_KEPT = 3


class Buffers:
    """Hands out tensors on the CPU, in memory of earlier ones that nothing refers to any more.

    Not for use after a fork: each process has its own.
    """

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def empty(self, shape: Sequence[int]) -> Tensor:
        """A float32 tensor of that shape, its values undefined."""
        size = int(np.prod(shape))
        place = next((i for i, memory in enumerate(self._free) if memory.size == size), None)
        memory = np.empty(size, dtype=np.float32) if place is None else self._free.pop(place)
        # the tensor's storage, which views and autograd share, holds this array; when it dies, the memory is free
        lent = memory.reshape(shape)
        weakref.finalize(lent, self._take_back, memory).atexit = False
        return torch.from_numpy(lent)

    def _take_back(self, memory: np.ndarray) -> None:
        self._free = [memory, *self._free][:_KEPT]
