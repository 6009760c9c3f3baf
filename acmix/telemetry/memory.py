"""What a training step keeps in memory, counted from the tensors themselves: works on any device."""

from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

MIB = 2**20


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step on one process: weights with buffers, gradients, optimizer state, saved activations.

    The total is a lower bound of the peak: temporary buffers of single operations come on top.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        parts = ("weights", "gradients", "optimizer", "activations")
        listed = ", ".join(f"{part} {getattr(self, part) / MIB:,.0f}" for part in parts)
        return f"{self.total / MIB:,.0f} MiB ({listed})"


class SavedActivations:
    """Counts the bytes that autograd keeps for the backward pass of what runs inside the `with` block.

    A storage that is saved several times, or a view of another saved one, counts once; the model's own weights do not.
    """

    def __init__(self, model: nn.Module) -> None:
        self._own = {_storage(tensor)[0] for tensor in (*model.parameters(), *model.buffers())}
        self._sizes: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._save, lambda saved: saved)

    @property
    def bytes(self) -> int:
        return sum(self._sizes.values())

    def __enter__(self) -> "SavedActivations":
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, traceback)

    def _save(self, tensor: Tensor) -> Tensor:
        address, size = _storage(tensor)
        if address not in self._own:
            self._sizes[address] = size
        return tensor.detach()  # the tensor itself would hold its graph, and the graph the tensor, for ever


def step_memory(model: nn.Module, optimizer: torch.optim.Optimizer, activations: int) -> StepMemory:
    """Memory of a training step, after the first one: before it, there are no gradients and no optimizer state.

    Args:
        activations: bytes, from `SavedActivations` around the forward pass and the loss.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return StepMemory(
        weights=_bytes(model.parameters()) + _bytes(model.buffers()),
        gradients=_bytes(trained),
        optimizer=_bytes(value for state in optimizer.state.values() for value in state.values()),
        activations=activations,
    )


def _storage(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _bytes(values: Any) -> int:
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))
