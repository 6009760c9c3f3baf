"""The effective receptive field: which pixels the middle of the last map depends on."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from acmix.analysis.blocks import measuring

SHARES = (0.2, 0.5, 0.99)


def receptive_field(model: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """Mean over images of Σ over colours |∂ y / ∂ pixel|, (H, W), float64, at least 0.

    y is the sum over channels of the middle of the last map, `model.forward_features`: one cell of an odd side, two of
    an even one. After Luo et al., "Understanding the effective receptive field in deep convolutional neural
    networks", https://arxiv.org/abs/1701.04128. `batches`: normalised images (B, C, H, W).
    """
    total: Tensor | None = None
    count = 0
    features: Any = model.forward_features
    with measuring(model), torch.enable_grad():
        for images in batches:
            pixels = images.detach().clone().requires_grad_()
            maps = features(pixels)
            if getattr(model, "output_fmt", "NCHW") == "NHWC":
                maps = maps.permute(0, 3, 1, 2)
            rows, columns = (slice((side - 1) // 2, side // 2 + 1) for side in maps.shape[-2:])
            (gradient,) = torch.autograd.grad(maps[..., rows, columns].sum(), pixels)
            part = gradient.double().abs().sum((0, 1))
            total = part if total is None else total + part
            count += len(images)
    if total is None:
        raise ValueError("no images to measure the receptive field with")
    return total / count


def field_areas(field: Tensor, shares: Iterable[float] = SHARES) -> dict[float, float]:
    """Area of the smallest centred rectangle that holds each share of the field's sum, as a share of the image's area.

    From near 0 to 1: a large area at 0.99 beside a small one at 0.2 is a field that is wide but peaked. The rectangle
    has the image's shape, as near as whole pixels allow, and is grown by a pixel at each end of the shorter side. After
    the area ratio of Ding et al., "Scaling up your kernels to 31×31", https://arxiv.org/abs/2203.06717.
    """
    height, width = field.shape
    found: dict[float, float] = {}
    left = sorted(shares)
    short = min(height, width)
    for half in range(1, (short + 1) // 2 + 1):
        part = min(1.0, (2 * half - short % 2) / short)
        rows, columns = _middle(height, part), _middle(width, part)
        inside = field[rows, columns].sum() / field.sum()
        while left and inside >= left[0] - 1e-12:
            found[left.pop(0)] = (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
    return found


def _middle(side: int, part: float) -> slice:
    """The middle pixels of a side, about `part` of it, as many on either side of its middle."""
    margin = round(side * (1 - part) / 2)
    return slice(margin, side - margin)
