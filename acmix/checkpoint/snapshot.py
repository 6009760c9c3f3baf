"""The state of a run at one step, copied off the device at once so that it can be written while training goes on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Snapshot:
    """Everything a run needs to go on from a step.

    model, ema: parameter name → tensor. training: optimizer, scaler and the like, of tensors, numbers, strings, lists,
    tuples and dicts (what `torch.load(weights_only=True)` reads). progress: JSON values: step, epoch, best metric, ...
    """

    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    training: dict[str, Any]
    progress: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer updates done when the snapshot was taken."""
        return int(self.progress["step"])


Place = tuple[Any, object]
"""Path of a nested value as (parent, key); made into a name only when the value is refused."""


class SnapshotBuffers:
    """Host copies of a snapshot's tensors, reused from one save to the next: a copy then costs one memcpy per tensor.

    Buffers for CUDA tensors are pinned, so that all copies run asynchronously before one synchronisation. They hold
    host memory for one full state as long as this object lives.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []  # in the order of the snapshot's tensors

    @torch.no_grad()
    def copy(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot with every tensor copied into a buffer; the previous copy must no longer be in use.

        Raises TypeError, naming the place, for a value in `training` that a weights-only load would refuse.
        """
        sources: list[Tensor] = []
        copied = Snapshot(
            model=self._replace(snapshot.model, sources, ((), "model")),
            ema=None if snapshot.ema is None else self._replace(snapshot.ema, sources, ((), "ema")),
            training=self._replace(snapshot.training, sources, ((), "training")),
            progress=snapshot.progress,
        )
        # One call for all tensors: a Python call for each costs more than the bytes of a small network.
        with _one_thread():
            torch._foreach_copy_(self._buffers[: len(sources)], sources, non_blocking=True)
        for device in {source.device for source in sources if not source.is_cpu}:
            torch.accelerator.synchronize(device)
        return copied

    def reserve(self, snapshot: Snapshot) -> Callable[[], None]:
        """A function that allocates buffers for snapshots like this one; it reads no values, so it may run in a thread.

        Memory is slow on its first touch (measured: twenty times the later copies), so the function touches it.
        """
        tensors = list(_tensors((snapshot.model, snapshot.ema, snapshot.training)))

        def work() -> None:
            for number, tensor in enumerate(tensors):
                self._buffer(number, tensor).zero_()

        return work

    def _replace(self, value: Any, sources: list[Tensor], place: Place) -> Any:
        """The same nested value with buffers for tensors; the tensors themselves are appended to `sources`."""
        if isinstance(value, Tensor):
            sources.append(value)
            return self._buffer(len(sources) - 1, value)
        if isinstance(value, dict):
            return {_plain(key, place): self._replace(item, sources, (place, key)) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            items = [self._replace(item, sources, (place, index)) for index, item in enumerate(value)]
            return items if isinstance(value, list) else tuple(items)
        return _plain(value, place)

    def _buffer(self, number: int, tensor: Tensor) -> Tensor:
        if number < len(self._buffers):
            buffer = self._buffers[number]
            if buffer.shape == tensor.shape and buffer.dtype == tensor.dtype:
                return buffer
        # Same strides as the original: the copy is a plain memcpy, and channels_last survives in `training`.
        buffer = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)
        self._buffers[number : number + 1] = [buffer]
        return buffer


@contextmanager
def _one_thread() -> Iterator[None]:
    """Copy in this thread alone: a memcpy gains little from more, and waits for them while loaders keep cores busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def state_bytes(value: Any) -> int:
    """Bytes of all tensors in nested dicts, lists and tuples."""
    return sum(tensor.nbytes for tensor in _tensors(value))


_EXACT = frozenset({bool, int, float, str, torch.dtype, type(None)})


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested dicts, lists and tuples, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _plain(value: Any, place: Place) -> Any:
    """The value as a built-in type: a numpy.float64 is a float, but weights-only loading refuses its pickle."""
    if type(value) in _EXACT:
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    raise TypeError(
        f"{_name(place)}: cannot be saved: {type(value).__name__} is not a tensor, number, string, list, tuple or dict"
    )


def _name(place: Place) -> str:
    parent, key = place
    return f"{_name(parent)}.{key}" if parent else str(key)
