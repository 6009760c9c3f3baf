"""The features of a patch, tap by tap: no copy of the map for each tap, forward or backward.

Shape legend: B batch, R channels of k, G features, T = K² taps, P = H * W pixels.
"""

import torch
from torch import Tensor

from acmix.ops.implementations import Window
from acmix.ops.patchwise.border import padded, unpadded
from acmix.ops.patchwise.parts import parts, taps


def forward(k: Tensor, scale: Tensor, offset: Tensor, weight: Tensor, window: Window) -> Tensor:
    """The features (B, G, H, W); arguments as in the public operation."""
    scale, offset, weight = (_by_tap(w, k) for w in (scale, offset, weight))
    out = k.new_empty(k.shape[0], weight.shape[1], *k.shape[2:])
    for part in parts(k):
        total = torch.zeros_like(out[part], dtype=weight.dtype).flatten(2)
        for tap, pixels in enumerate(taps(padded(k[part], window.reach), window.kernel_size)):
            active = torch.addcmul(offset[tap], pixels, scale[tap]).relu_()
            total.baddbmm_(weight[tap].expand(len(total), -1, -1), active.flatten(2))
        out[part] = total.view_as(out[part])
    return out


def backward(
    grad_out: Tensor, k: Tensor, scale: Tensor, offset: Tensor, weight: Tensor, window: Window
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of k, the scale, the offset and the weight; what was active is computed again."""
    scales, offsets, weights = (_by_tap(w, k) for w in (scale, offset, weight))
    dk = k.new_empty(k.shape)
    dscale, doffset, dweight = (torch.zeros_like(w) for w in (scales, offsets, weights))
    for part in parts(k):
        maps, grad = padded(k[part], window.reach), grad_out[part].to(weights.dtype).flatten(2)
        dmaps = torch.zeros_like(maps)
        both = zip(taps(maps, window.kernel_size), taps(dmaps, window.kernel_size), strict=True)
        for tap, (pixels, dpixels) in enumerate(both):
            active = torch.addcmul(offsets[tap], pixels, scales[tap]).relu_()
            dweight[tap] += torch.einsum("bgp,brp->gr", grad, active.flatten(2))
            dactive = torch.matmul(weights[tap].T, grad).view_as(active)
            dactive = torch.ops.aten.threshold_backward(dactive, active, 0)
            doffset[tap] += dactive.sum((0, 2, 3))[:, None, None]
            dscale[tap] += (dactive * pixels).sum((0, 2, 3))[:, None, None]
            dpixels.addcmul_(dactive, scales[tap])
        dk[part] = unpadded(dmaps, k[part], window.reach)
    dscale, doffset = (grad.flatten(1).T.contiguous().to(scale.dtype) for grad in (dscale, doffset))
    return dk, dscale, doffset, dweight.permute(1, 2, 0).contiguous().to(weight.dtype)


def _by_tap(weight: Tensor, k: Tensor) -> Tensor:
    """The numbers for each tap together, in float32 or better: (R, T) as (T, R, 1, 1), (G, R, T) as (T, G, R)."""
    wide = weight.to(torch.promote_types(k.dtype, torch.float32))
    return wide.T[..., None, None].contiguous() if wide.dim() == 2 else wide.permute(2, 0, 1).contiguous()
