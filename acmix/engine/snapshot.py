"""The state of a run at one step, copied off the device at once so that it can be written while training goes on."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Snapshot:
    """Everything a run needs to go on from a step.

    model, ema: parameter name → tensor. training: optimiser, scaler and the like, of tensors, numbers, strings, lists,
    tuples and dicts (what `torch.load(weights_only=True)` reads). progress: JSON values: step, epoch, best metric, ...
    """

    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    training: dict[str, Any]
    progress: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimiser updates done when the snapshot was taken."""
        return int(self.progress["step"])


class SnapshotBuffers:
    """Host copies of a snapshot's tensors, kept from one save to the next: a copy then costs one memcpy per tensor.

    Buffers for CUDA tensors are pinned, so that all copies run asynchronously before one synchronisation. They hold
    one state's worth of host memory for as long as this object lives.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, ...], Tensor] = {}
        self._devices: set[torch.device] = set()

    def copy(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot with every tensor copied into a buffer; the previous copy must no longer be in use.

        Raises TypeError, naming the place, for a value in `training` that a weights-only load would refuse.
        """
        self._devices.clear()
        copied = Snapshot(
            model=self._copy(snapshot.model, ("model",)),
            ema=None if snapshot.ema is None else self._copy(snapshot.ema, ("ema",)),
            training=self._copy(snapshot.training, ("training",)),
            progress=snapshot.progress,
        )
        for device in self._devices:
            torch.accelerator.synchronize(device)
        return copied

    def reserve(self, snapshot: Snapshot) -> Callable[[], None]:
        """Work that gets the buffers for such a snapshot; it reads no values, so it may run beside the training loop.

        Fresh memory is slow on its first touch (measured: twenty times the later copies), so it is touched there.
        """
        places = [("model", snapshot.model), ("ema", snapshot.ema), ("training", snapshot.training)]
        wanted = [pair for place, value in places for pair in _tensors(value, (place,))]

        def work() -> None:
            for place, tensor in wanted:
                self._buffer(tensor, place).zero_()

        return work

    def _copy(self, value: Any, place: tuple[str, ...]) -> Any:
        if isinstance(value, Tensor):
            return self._copy_tensor(value.detach(), place)
        if isinstance(value, Mapping):
            return {_plain(key, place): self._copy(item, (*place, str(key))) for key, item in value.items()}
        if isinstance(value, list | tuple):
            items = [self._copy(item, (*place, str(index))) for index, item in enumerate(value)]
            return items if isinstance(value, list) else tuple(items)
        return _plain(value, place)

    def _copy_tensor(self, tensor: Tensor, place: tuple[str, ...]) -> Tensor:
        buffer = self._buffer(tensor, place)
        on_device = tensor.device.type != "cpu"
        buffer.copy_(tensor, non_blocking=on_device)
        if on_device:
            self._devices.add(tensor.device)
        return buffer

    def _buffer(self, tensor: Tensor, place: tuple[str, ...]) -> Tensor:
        buffer = self._buffers.get(place)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            # Same strides as the original: the copy is a plain memcpy, and channels_last survives in `training`.
            buffer = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._buffers[place] = buffer
        return buffer


def _tensors(value: Any, place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Every tensor in a nest of dicts, lists and tuples, with the keys that lead to it."""
    if isinstance(value, Tensor):
        yield place, value.detach()
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, (*place, str(key)))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _tensors(item, (*place, str(index)))


def state_bytes(value: Any) -> int:
    """Bytes of all tensors in a nest of dicts, lists and tuples."""
    return sum(tensor.numel() * tensor.element_size() for _, tensor in _tensors(value, ()))


def _plain(value: Any, place: tuple[str, ...]) -> Any:
    """The value as a built-in type: numpy's float64 is a float too, but weights-only loading refuses its pickle."""
    if value is None or isinstance(value, bool | torch.dtype):
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    raise TypeError(
        f"{'.'.join(place)}: cannot be saved: {type(value).__name__} is not a tensor, number, string, list, tuple or "
        "dict"
    )
