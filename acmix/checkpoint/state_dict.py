"""What a state dict is: names and tensors, and nothing else."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_SHOWN = 5


def state_dict_refusal(content: Any) -> str | None:
    """Why a network's parameters cannot be copied from this, in words a person can act on, or None if they can.

    Whether it has those of a certain network is not asked here: one without entries will do.
    """
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}, not names and tensors"
    if strangers := [name for name, value in content.items() if not isinstance(value, Tensor)]:
        return f"these entries are no tensors: {_listed(strangers)}"
    if strangers := [name for name, value in content.items() if not _has_numbers(value)]:
        return f"these tensors are sparse, quantised, complex or on the meta device: {_listed(strangers)}"
    return None


def _has_numbers(tensor: Tensor) -> bool:
    """Whether real numbers can be copied from it as they are."""
    return tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_quantized or tensor.is_complex())


def _listed(names: list[Any]) -> str:
    more = f", … {len(names)} in all" if len(names) > _SHOWN else ""
    return ", ".join(map(str, names[:_SHOWN])) + more
