"""Patchwise attention (SAN) in two steps: public operations, reference, checks, registration with torch.library.

Both take one map, three tensors that belong to it, and visit the K × K patch around every pixel. The patch is reflected
at the border, again and again where the map is not larger than K // 2.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import CustomOpDef

from acmix.ops.derivatives import plain_gradients, refuse_forward_ad, register_second_derivative
from acmix.ops.implementations import Operation, Problem, Window, announcing, transformed
from acmix.ops.maps import check_pixels, keepable, without_autocast
from acmix.ops.patchwise.border import reflected
from acmix.ops.patchwise.implementations import PATCH_AGGREGATION, PATCH_FEATURES


def patch_features(
    k: Tensor, scale: Tensor, offset: Tensor, weight: Tensor, kernel_size: int, impl: str = "auto"
) -> Tensor:
    """Features of the patch around every pixel: normalised, rectified and mixed.

        out[:, g] = sum over channels r and taps t of weight[g, r, t] * relu(scale[r, t] * k_t[:, r] + offset[r, t])

    where k_t is k shifted by tap t, row by row from the top left.

    Args:
        k: Maps (B, R, H, W), any strides.
        scale, offset: (R, K²): an affine normalisation of every channel at every tap.
        weight: (G, R, K²).
        kernel_size: K, odd.
        impl: `auto`, `taps` (tap by tap: nothing K² times as large as the map, forward or backward) or `reference`.

    Returns:
        (B, G, H, W) in the dtype of k; sums are taken in float32 or better.

    Raises:
        ValueError: for shapes that do not fit together, empty maps, maps of integers, an even kernel_size, an unknown
            impl or one that cannot run.
    """
    _check_map(k)
    channels, members = k.shape[1], kernel_size**2
    if scale.shape != (channels, members) or offset.shape != scale.shape or weight.shape[1:] != scale.shape:
        raise ValueError(
            f"for {channels} channels and kernel_size {kernel_size}, scale and offset must be {(channels, members)}, "
            f"weight (G, {channels}, {members}), got {tuple(scale.shape)}, {tuple(offset.shape)}, {tuple(weight.shape)}"
        )
    return _run(PATCH_FEATURES, _features, plain_features, (k, scale, offset, weight), kernel_size, impl)


def patch_aggregation(
    v: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, kernel_size: int, impl: str = "auto"
) -> Tensor:
    """Sum of the patch around every pixel with weights that follow from a hidden map at that pixel.

        out[:, c] = sum over taps t of (sum over h of weight[g, t, h] * hidden[:, h] + bias[g, t]) * v_t[:, c]

    with g = c mod G: neighbouring channels have different weights.

    Args:
        v: Maps (B, C, H, W), any strides.
        hidden: Maps (B, G, H, W); G divides C.
        weight: (G, K², G).
        bias: (G, K²).
        kernel_size: K, odd.
        impl: As for `patch_features`.

    Returns:
        (B, C, H, W) in the dtype of v; sums are taken in float32 or better.

    Raises:
        ValueError: as for `patch_features`.
    """
    _check_map(v)
    if hidden.dim() != 4 or (hidden.shape[0], *hidden.shape[2:]) != (v.shape[0], *v.shape[2:]) or not hidden.shape[1]:
        raise ValueError(f"hidden must be maps (B, G, H, W) of the size of v, {tuple(v.shape)}: {tuple(hidden.shape)}")
    groups, members = hidden.shape[1], kernel_size**2
    if weight.shape != (groups, members, groups) or bias.shape != (groups, members) or v.shape[1] % groups:
        raise ValueError(
            f"for {v.shape[1]} channels, {groups} groups and kernel_size {kernel_size}, the groups must divide the "
            f"channels, weight be {(groups, members, groups)} and bias {(groups, members)}, got {tuple(weight.shape)} "
            f"and {tuple(bias.shape)}"
        )
    return _run(PATCH_AGGREGATION, _aggregation, plain_aggregation, (v, hidden, weight, bias), kernel_size, impl)


def _check_map(maps: Tensor) -> None:
    if maps.dim() != 4 or not maps.is_floating_point():
        raise ValueError(f"the maps must be (B, C, H, W) of floating-point numbers: {maps.dtype} {tuple(maps.shape)}")
    check_pixels(*maps.shape[2:])


def plain_features(k: Tensor, scale: Tensor, offset: Tensor, weight: Tensor, kernel_size: int) -> Tensor:
    """`patch_features` in plain PyTorch, over K² copies of the map."""
    patches = _patches(k, kernel_size)  # (B, R, K², H * W)
    active = (patches * scale[..., None] + offset[..., None]).relu()
    out = torch.einsum("brtp,grt->bgp", active, weight.to(active.dtype))
    return out.unflatten(2, k.shape[2:]).to(k.dtype)


def plain_aggregation(v: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, kernel_size: int) -> Tensor:
    """`patch_aggregation` in plain PyTorch, over K² copies of the map and of the weights."""
    hidden = hidden.flatten(2).to(torch.promote_types(hidden.dtype, weight.dtype))
    weights = torch.einsum("gth,bhp->bgtp", weight.to(hidden.dtype), hidden) + bias[..., None]
    patches = _patches(v, kernel_size).unflatten(1, (-1, hidden.shape[1]))  # (B, S, G, K², H * W)
    return (patches * weights[:, None]).sum(3).flatten(1, 2).unflatten(2, v.shape[2:]).to(v.dtype)


def _patches(maps: Tensor, kernel_size: int) -> Tensor:
    return F.unfold(reflected(maps, kernel_size // 2), kernel_size).unflatten(1, (maps.shape[1], -1))


def _run(
    operation: Operation,
    registered: CustomOpDef,
    plain: Callable[..., Tensor],
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    kernel_size: int,
    impl: str,
) -> Tensor:
    window = Window(kernel_size, 1, 1)
    choice = operation.resolve(impl, Problem.of(tensors[0], 1, window))
    with without_autocast(tensors[0]):
        out: Tensor = (
            plain(*tensors, kernel_size) if choice == "reference" else registered(*tensors, kernel_size, choice)
        )
        return out


def _register(
    operation: Operation, plain: Callable[..., Tensor], out_channels: Callable[[Tensor, Tensor], int]
) -> CustomOpDef:
    """The operation as one node of a graph; `out_channels` follow from its map and its last tensor."""

    @torch.library.custom_op(f"acmix::{operation.name}", mutates_args=())
    def forward(maps: Tensor, a: Tensor, b: Tensor, c: Tensor, kernel_size: int, impl: str) -> Tensor:
        refuse_forward_ad(operation.name)
        window = Window(kernel_size, 1, 1)
        if announcing():  # a compiled graph does not come through `resolve`
            operation.announce(impl, Problem.of(maps, 1, window))
        out: Tensor = operation.load(impl).forward(maps, a, b, c, window)
        return out

    @forward.register_fake
    def _(maps: Tensor, a: Tensor, b: Tensor, c: Tensor, kernel_size: int, impl: str) -> Tensor:
        return maps.new_empty(maps.shape[0], out_channels(maps, c), *maps.shape[2:])

    @torch.library.custom_op(f"acmix::{operation.name}_backward", mutates_args=())
    def backward(
        grad_out: Tensor, maps: Tensor, a: Tensor, b: Tensor, c: Tensor, kernel_size: int, impl: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with without_autocast(maps):  # a backward pass may be started under autocast
            grads: tuple[Tensor, Tensor, Tensor, Tensor] = operation.load(impl).backward(
                grad_out, maps, a, b, c, Window(kernel_size, 1, 1)
            )
            return grads

    @backward.register_fake
    def _(
        grad_out: Tensor, maps: Tensor, a: Tensor, b: Tensor, c: Tensor, kernel_size: int, impl: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        first, second, third, fourth = (m.new_empty(m.shape) for m in (maps, a, b, c))
        return first, second, third, fourth

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*keepable(inputs[0]), *inputs[1:4])
        ctx.options = inputs[4:]

    def autograd_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        if transformed():
            grads = plain_gradients(operation.name, plain, ctx.saved_tensors, ctx.options[:-1], grad_out)
        else:
            grads = backward(grad_out, *ctx.saved_tensors, *ctx.options)
        return *grads, None, None

    forward.register_autograd(autograd_backward, setup_context=setup_context)
    register_second_derivative(operation.name, backward, plain, options=1)
    return forward


_features = _register(PATCH_FEATURES, plain_features, lambda maps, weight: weight.shape[0])
_aggregation = _register(PATCH_AGGREGATION, plain_aggregation, lambda maps, bias: maps.shape[1])
