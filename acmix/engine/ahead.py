"""Batches made ready on the device of the network, on CUDA one step ahead of the one that is computed."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from acmix.data.loader import Batch


def on_device(steps: Iterable[list["Batch"]], device: torch.device, *, channels_last: bool) -> Iterator[list["Batch"]]:
    """The batches of each step with their images and targets on the device.

    On CUDA the next step's batches are copied, normalised and erased on a stream of their own while the step before is
    computed.
    """
    if device.type != "cuda":
        for batches in steps:
            yield [batch.to(device, channels_last=channels_last) for batch in batches]
        return
    stream = torch.cuda.Stream(device)
    waiting: tuple[list[Batch], torch.cuda.Event] | None = None
    for batches in steps:
        with torch.cuda.stream(stream):
            moved = [batch.to(device, channels_last=channels_last) for batch in batches]
        if waiting is not None:
            yield _taken_over(*waiting, device)
        waiting = moved, stream.record_event()
    if waiting is not None:
        yield _taken_over(*waiting, device)


def _taken_over(batches: list["Batch"], ready: torch.cuda.Event, device: torch.device) -> list["Batch"]:
    """Have the stream that computes wait for the batches, and their memory live until it is done with them."""
    stream = torch.cuda.current_stream(device)
    stream.wait_event(ready)
    for batch in batches:
        batch.images.record_stream(stream)
        batch.targets.record_stream(stream)
    return batches
