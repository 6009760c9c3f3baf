"""Buffers that follow from a module's arguments, not from its state dict."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn


class DerivedBuffers(nn.Module):
    """Base of modules that register such buffers as not persistent: made again when the module leaves the meta device.

    A module built on the meta device holds no numbers. Its parameters get theirs from a state dict, or from
    `reset_parameters` after `to_empty`; these buffers get theirs from `derived_buffers`.
    """

    def derived_buffers(self) -> dict[str, Tensor]:
        """The buffers by name, freshly made."""
        raise NotImplementedError

    def register_derived_buffers(self) -> None:
        """Make and register them; for the constructor."""
        for name, buffer in self.derived_buffers().items():
            self.register_buffer(name, buffer, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        on_meta = self._derived_on_meta()
        super()._apply(fn, recurse)
        self._derive_again(on_meta)
        return self

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        super()._load_from_state_dict(*arguments, **options)
        self._derive_again(self._derived_on_meta())  # with assign=True the parameters are real now

    def _derived_on_meta(self) -> dict[str, Tensor]:
        buffers = ((name, self._buffers[name]) for name in self._non_persistent_buffers_set)
        return {name: buffer for name, buffer in buffers if buffer is not None and buffer.is_meta}

    def _derive_again(self, lost: dict[str, Tensor]) -> None:
        device = next(self.parameters()).device
        if lost and device.type != "meta":
            with torch.device(device):
                made = self.derived_buffers()
            self._buffers.update({name: made[name].to(buffer.dtype) for name, buffer in lost.items()})
