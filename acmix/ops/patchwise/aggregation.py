"""The weighted sum over a patch, tap by tap: the weights of one tap at a time, and no copy of the values.

Shape legend: B batch, G groups, C = S * G channels of v, T = K² taps, P = H * W pixels.
"""

import torch
from torch import Tensor

from acmix.ops.implementations import Window
from acmix.ops.patchwise.border import padded, unpadded
from acmix.ops.patchwise.parts import parts, taps


def forward(v: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, window: Window) -> Tensor:
    """The aggregated map (B, C, H, W); arguments as in the public operation."""
    weights, biases = _by_tap(weight, bias, v)
    out = v.new_empty(v.shape)
    for part in parts(v):
        given = hidden[part].to(weights.dtype, memory_format=torch.contiguous_format)
        total = _grouped(torch.zeros_like(out[part], dtype=weights.dtype), given)
        for tap, values in enumerate(taps(padded(v[part], window.reach), window.kernel_size)):
            total.addcmul_(_weights(given, weights[tap], biases[tap])[:, None], _grouped(values, given))
        out[part] = total.flatten(1, 2)
    return out


def backward(
    grad_out: Tensor, v: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, window: Window
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of v, the hidden map, the weight and the bias; the weights of each tap are computed again."""
    weights, biases = _by_tap(weight, bias, v)
    dv, dhidden = v.new_empty(v.shape), hidden.new_empty(hidden.shape)
    dweight, dbias = torch.zeros_like(weights), torch.zeros_like(biases)
    for part in parts(v):
        given = hidden[part].to(weights.dtype, memory_format=torch.contiguous_format)
        grad = _grouped(grad_out[part].to(weights.dtype, memory_format=torch.contiguous_format), given)
        maps = padded(v[part], window.reach)
        dmaps, dgiven = torch.zeros_like(maps), torch.zeros_like(given).flatten(2)
        both = zip(taps(maps, window.kernel_size), taps(dmaps, window.kernel_size), strict=True)
        for tap, (values, dvalues) in enumerate(both):
            _grouped(dvalues, given).addcmul_(_weights(given, weights[tap], biases[tap])[:, None], grad)
            dtap = (grad * _grouped(values, given)).sum(1).flatten(2)
            dweight[tap] += torch.einsum("bgp,bhp->gh", dtap, given.flatten(2))
            dbias[tap] += dtap.sum((0, 2))[:, None]
            dgiven.baddbmm_(weights[tap].T.expand(len(dtap), -1, -1), dtap)
        dv[part], dhidden[part] = unpadded(dmaps, v[part], window.reach), dgiven.view_as(given)
    dweight = dweight.transpose(0, 1).contiguous().to(weight.dtype)
    return dv, dhidden, dweight, dbias[..., 0].T.contiguous().to(bias.dtype)


def _weights(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The weights of one tap: (B, G, H, W)."""
    made = torch.baddbmm(bias, weight.expand(len(hidden), -1, -1), hidden.flatten(2))
    return made.view_as(hidden)


def _grouped(maps: Tensor, hidden: Tensor) -> Tensor:
    """(B, C, H, W) as (B, S, G, H, W)."""
    return maps.unflatten(1, (-1, hidden.shape[1]))


def _by_tap(weight: Tensor, bias: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers for each tap together, in float32 or better: the weight (T, G, G), the bias (T, G, 1)."""
    wide = torch.promote_types(v.dtype, torch.float32)
    return weight.transpose(0, 1).to(wide).contiguous(), bias.T[..., None].to(wide).contiguous()
