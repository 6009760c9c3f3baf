"""The maps q, k and v as both operations take them: one shape, cast by autocast, any memory format."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value


def check_maps(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless q, k and v have one shape of four dimensions."""
    if q.dim() != 4 or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(
            f"q, k and v must be maps of one shape (B, heads * head_dim, H, W), got {tuple(q.shape)}, {tuple(k.shape)} "
            f"and {tuple(v.shape)}"
        )


def check_contents(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless q, k and v have one floating-point dtype and at least one pixel."""
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k and v must have one floating-point dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    check_pixels(*q.shape[2:])


def check_pixels(height: int, width: int) -> None:
    """Raise ValueError unless a map of this size has at least one pixel; one of any size, in a graph, has."""
    if not torch.jit.is_tracing() and not are_dynamic((height, width)) and min(height, width) < 1:
        raise ValueError(f"a map of {height}×{width} pixels is empty: at least one pixel is needed")


def check_device(maps: Tensor, *others: Tensor | None) -> None:
    """Raise ValueError unless all tensors are where the maps are: the libraries take addresses, of any memory."""
    for other in others:
        if other is not None and other.device != maps.device:
            raise ValueError(f"tensors on {maps.device} and on {other.device}: move maps and weights to one device")


def is_exporting() -> bool:
    """Whether torch.export traces; its own answer is yes in all that torch.compile traces, up to PyTorch 2.11."""
    flag: bool | None = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_exporting() if flag is None else flag


def are_uneven(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether q, k and v, maps of one size, have different numbers of channels.

    Raises:
        ValueError: for tensors of other than four dimensions, or of different batches or sizes.
    """
    rests = [(m.shape[0], *m.shape[2:]) for m in (q, k, v)]
    if q.dim() != 4 or rests[1] != rests[0] or rests[2] != rests[0]:
        check_maps(q, k, v)
    return not q.shape[1] == k.shape[1] == v.shape[1]


def cast_maps(dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What autocast does to the operands of a matrix product: to `dtype`, except from float64."""
    return tuple(m if m.dtype == torch.float64 else m.to(dtype) for m in (q, k, v))  # type: ignore[return-value]


def autocast_dtype(maps: Tensor) -> torch.dtype | None:
    """What autocast casts to on the maps' device, or None where it is off."""
    device = maps.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # autocast does not know the meta device
        return None
    return torch.get_autocast_dtype(device)


def without_autocast(maps: Tensor) -> AbstractContextManager[object]:
    """Turns autocast off on the maps' device."""
    device = maps.device.type
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def is_channels_last(maps: Tensor) -> bool:
    """Whether the channels of a pixel are adjacent in memory: channels_last maps, and slices of their channels."""
    return maps.stride(1) == 1 and maps.shape[1] > 1


def are_dynamic(sizes: Sequence[int]) -> bool:
    """Whether a size or stride stands for any number, in a graph that is being traced for maps of any size.

    A choice that depends on such a size would tie the graph to the sizes for which it is right.
    """
    if torch.compiler.is_compiling():
        return not all(map(has_static_value, sizes))
    return torch.SymInt in map(type, sizes)


def empty_like_layout(maps: Tensor, height: int, width: int) -> Tensor:
    """An uninitialised (B, C, height, width) map, channels_last where `maps` is."""
    layout = torch.channels_last if is_channels_last(maps) else torch.contiguous_format
    size = (maps.shape[0], maps.shape[1], height, width)
    return torch.empty(size, dtype=maps.dtype, device=maps.device, memory_format=layout)


@torch.library.custom_op("acmix::copy", mutates_args=())
def _copy(maps: Tensor) -> Tensor:
    """A copy that torch.compile neither leaves out nor makes again."""
    return maps.clone()


@_copy.register_fake
def _(maps: Tensor) -> Tensor:
    return torch.empty_like(maps)


_copy.register_autograd(lambda ctx, grad: grad)


def keepable(*maps: Tensor) -> tuple[Tensor, ...]:
    """The maps as torch.compile can keep them for the backward pass: copies where their height or width is dynamic.

    To keep a view, as q, k and v are of one projection, Inductor orders its strides, which it cannot do with strides
    that are dynamic (pytorch #172204).
    """
    if is_exporting() or not are_dynamic(maps[0].stride()):
        return maps
    return tuple(map(_copy, maps))
