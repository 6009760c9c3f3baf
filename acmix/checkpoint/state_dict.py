"""What a state dict is: names and tensors, and nothing else."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_SHOWN = 5


def state_dict_refusal(content: Any) -> str | None:
    """Why this is no state dict, in words a person can act on, or None. One without entries is."""
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}, not names and tensors"
    strangers = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if not strangers:
        return None
    more = f", … {len(strangers)} in all" if len(strangers) > _SHOWN else ""
    return f"these entries are no tensors: {', '.join(strangers[:_SHOWN])}{more}"
