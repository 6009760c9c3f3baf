"""The arguments `device` and `dtype` of a network's constructor, as timm and PyTorch's modules have them."""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn


def placed(init: Callable[..., None]) -> Callable[..., None]:
    """Let a constructor take `device` and `dtype`: what it builds is made there, and is of that type in the end."""

    @functools.wraps(init)
    def build(
        self: nn.Module,
        *arguments: Any,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **keywords: Any,
    ) -> None:
        with nullcontext() if device is None else torch.device(device):
            init(self, *arguments, **keywords)
        if dtype is not None:
            self.to(dtype)

    return build
