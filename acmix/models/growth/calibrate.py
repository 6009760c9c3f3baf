"""A residual network grown with the help of images: block by block, on what the grown blocks before it give."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmix.layers import ACmix
from acmix.models.growth.kernels import Factors

_VALUES = 2**24
"""Values that are held at a time beside the maps themselves."""
_RIDGE = 1e-3
"""How strongly the fit is held to the kernels of the truncated SVD, as a share of the maps' mean second moment."""


def second_moments(maps: Iterable[Tensor]) -> Tensor:
    """(C, C) in float64, over images and pixels."""
    total, count = torch.zeros(()), 0
    for batch in maps:
        pixels = batch.transpose(0, 1).flatten(1)  # (C, B H W)
        total = total.to(pixels.device) + (pixels @ pixels.mT).double()
        count += pixels.shape[1]
    return total / count


def fit_kernels(block: ACmix, factors: Factors, inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> Factors:
    """The kernels that, over the same projections, give `outputs` from `inputs` best: least squares, held to `factors`.

    Args:
        block: The block that the kernels are for.
        factors: Its kernels as they are.
        inputs: Maps (B, C_in, H, W) as the block gets them.
        outputs: Maps (B, C, h, w) as it should give them, channels (head_dim, head).
    """
    groups, heads, taps, held = factors.kernels.shape
    maps_weight, side = factors.maps.flatten(0, 1)[:, :, None, None], round(taps**0.5)
    normal = factors.maps.new_zeros(groups, held * taps, held * taps)
    right = factors.maps.new_zeros(groups, held * taps, heads)
    count = 0
    for batch, wanted in zip(inputs, outputs, strict=True):
        images = max(1, _VALUES // (groups * held * taps * wanted[0, 0].numel()))
        for x, y in zip(batch.split(images), wanted.split(images), strict=True):
            maps = F.conv2d(x, maps_weight.to(x.dtype))
            seen = F.unfold(maps, side, padding=side // 2, stride=block.stride).unflatten(1, (groups, -1))
            seen = seen.permute(1, 2, 0, 3).flatten(2)  # (d, r k², pixels)
            told = y.unflatten(1, (groups, heads)).permute(1, 0, 3, 4, 2).flatten(1, 3)  # (d, pixels, N)
            normal += seen @ seen.mT
            right += seen @ told
            count += told.shape[1]
    normal, right = normal / count, right / count
    before = factors.kernels.permute(0, 3, 2, 1).flatten(1, 2)  # (d, r k², N)
    hold = _RIDGE * normal.diagonal(dim1=1, dim2=2).mean(1)[:, None, None].clamp_min(1e-30)
    normal.diagonal(dim1=1, dim2=2).add_(hold[:, :, 0])
    fitted = torch.linalg.solve(normal, right + hold * before)
    return Factors(fitted.unflatten(1, (held, taps)).permute(0, 3, 2, 1), factors.maps, factors.energy)


def explained(outputs: Iterable[Tensor], given: Iterable[Tensor], scale: Tensor) -> float:
    """The share of the variance of `outputs` that `given` gives, with each channel's error counted by `scale` (C,).

    Of outputs without variance, such as those of a dead layer, it is 1 where `given` gives just them, else 0.
    """
    error, square, total, count = 0.0, 0.0, torch.zeros(()), 0
    for y, z in zip(outputs, given, strict=True):
        weight = scale[:, None, None]
        error += float(((y - z).double() * weight).square().sum())
        square += float((y.double() * weight).square().sum())
        total = total.to(y.device) + (y.double() * weight).sum((0, 2, 3))
        count += y[:, 0].numel()
    variance, nothing = square - float(total.square().sum()) / count, 1e-12 * square  # what rounding leaves
    return 1 - error / variance if variance > nothing else float(error <= nothing)


def shift_statistics(norm: nn.Module, before: Iterable[Tensor], now: Iterable[Tensor]) -> None:
    """Change a batch norm's running statistics as those of its inputs change from `before` to `now`.

    The statistics of the whole training stay the base: where nothing changes, they are as they were.
    """
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    (old_mean, old_variance), (mean, variance) = _statistics(before), _statistics(now)
    norm.running_mean += (mean - old_mean).to(norm.running_mean)
    ratio = torch.where(old_variance > 0, variance / old_variance, 1.0)
    norm.running_var *= ratio.to(norm.running_var)


def _statistics(maps: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    total, squares, count = torch.zeros(()), torch.zeros(()), 0
    for batch in maps:
        values = batch.double()
        total = total.to(values.device) + values.sum((0, 2, 3))
        squares = squares.to(values.device) + values.square().sum((0, 2, 3))
        count += values[:, 0].numel()
    mean = total / count
    return mean, (squares / count - mean.square()).clamp_min(0)
