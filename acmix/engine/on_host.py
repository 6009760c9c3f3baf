"""Small results that travel from the device to the host while the device goes on working."""

import torch
from torch import Tensor


class OnHost:
    """A copy of a small tensor on the host, begun now and waited for only where it is read.

    On a GPU the copy waits for the kernels queued so far, not for those queued after it: a loss that is copied before
    the backward pass is queued can be read while that pass runs. On a CPU it is the tensor itself.
    """

    def __init__(self, value: Tensor) -> None:
        self._copy, self._arrived = value.detach(), None
        if value.device.type == "cuda":
            self._copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            beside = _side_stream(value.device)
            beside.wait_stream(torch.cuda.current_stream(value.device))
            with torch.cuda.stream(beside):
                self._copy.copy_(value.detach(), non_blocking=True)
            value.record_stream(beside)
            self._arrived = beside.record_event()

    def read(self) -> Tensor:
        """The value on the host, without gradient; waits until it is there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy


_side_streams: dict[torch.device, torch.cuda.Stream] = {}


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _side_streams:
        _side_streams[device] = torch.cuda.Stream(device)
    return _side_streams[device]
