"""Reflection at the border of maps of any size."""

import torch
import torch.nn.functional as F
from torch import Tensor


def reflection(size: int, reach: int, device: torch.device) -> Tensor:
    """Which of `size` pixels stands at each place from -reach to size + reach - 1.

    A map not larger than the reach is reflected again and again; one of a single pixel is repeated.
    """
    period = (2 * torch.arange(size, device=device).amax(0)).clamp(min=1)  # a tensor: ONNX has no remainder by a symbol
    place = torch.arange(-reach, size + reach, device=device).abs() % period
    return torch.minimum(place, period - place)


def reflected(maps: Tensor, reach: int) -> Tensor:
    """Maps (..., H, W) with `reach` reflected pixels on every side, in plain PyTorch without a choice by the size."""
    rows, columns = (reflection(size, reach, maps.device) for size in maps.shape[-2:])
    return maps.index_select(-2, rows).index_select(-1, columns)


def padded(maps: Tensor, reach: int) -> Tensor:
    """The same as `reflected`, by the fastest way, contiguous, in float32 or better."""
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32), memory_format=torch.contiguous_format)
    if reach < min(maps.shape[-2:]):
        return F.pad(maps, (reach,) * 4, mode="reflect")
    return reflected(maps, reach)


def unpadded(grad: Tensor, maps: Tensor, reach: int) -> Tensor:
    """The adjoint of `padded`: what each pixel of `maps` gets of a gradient (B, C, H + 2 * reach, W + 2 * reach)."""
    if reach < min(maps.shape[-2:]):
        return torch.ops.aten.reflection_pad2d_backward(grad, maps.to(grad.dtype).contiguous(), [reach] * 4)
    rows, columns = (reflection(size, reach, maps.device) for size in maps.shape[-2:])
    grad = grad.new_zeros(*maps.shape[:3], grad.shape[3]).index_add_(2, rows, grad)
    return grad.new_zeros(maps.shape).index_add_(3, columns, grad)
