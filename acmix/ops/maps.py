"""The maps q, k and v as both operations take them: one shape, cast by autocast, any memory format."""

import torch
from torch import Tensor


def check_maps(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless q, k and v have one shape of four dimensions."""
    if q.dim() != 4 or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(
            f"q, k and v must be maps of one shape (B, heads * head_dim, H, W), got {tuple(q.shape)}, {tuple(k.shape)} "
            f"and {tuple(v.shape)}"
        )


def cast_maps(dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What autocast does to the operands of a matrix product: to `dtype`, except from float64."""
    return tuple(m if m.dtype == torch.float64 else m.to(dtype) for m in (q, k, v))  # type: ignore[return-value]


def is_channels_last(maps: Tensor) -> bool:
    """Whether the channels of a pixel are adjacent in memory: channels_last maps, and slices of their channels."""
    return maps.stride(1) == 1 and maps.shape[1] > 1


def empty_like_layout(maps: Tensor, height: int, width: int) -> Tensor:
    """An uninitialised (B, C, height, width) map, channels_last where `maps` is."""
    layout = torch.channels_last if is_channels_last(maps) else torch.contiguous_format
    size = (maps.shape[0], maps.shape[1], height, width)
    return torch.empty(size, dtype=maps.dtype, device=maps.device, memory_format=layout)
