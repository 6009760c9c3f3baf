"""Backward kernels of local attention and their launchers.

Two kernels, each recomputing the weights from the saved log-sum-exp. The first owns queries as the forward does and
writes dq, delta = sum(dO * O) and its share of the position gradient for the host to sum; the second owns keys, streams
the queries that see them and writes dk and dv. Every element has one writer, so two runs give the same bits.

With t_i = sum_j ds_ij (p_j - p_i), dq_i = scale (sum_j ds_ij k_j - P t_i) and dP = -scale sum_i q_i t_i^T. That p_i
matters: sum_j ds_ij is zero only up to rounding, and p is much larger than a window.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from acmix.ops.gpu import device_guard
from acmix.ops.implementations import Window
from acmix.ops.local_attention.triton.launch import Geometry, launch
from acmix.ops.local_attention.triton.window import LN2, NEVER, dot, locate, log2_count, pixel_offsets
from acmix.ops.maps import empty_like_layout


@triton.jit
def _query_gradient_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, position_ptr, out_ptr, lse_ptr, factor_ptr, dq_ptr, delta_ptr, d_position_ptr,
    grad_sb, grad_sc, grad_sy, grad_sx, q_sb, q_sc, q_sy, q_sx, k_sb, k_sc, k_sy, k_sx, v_sb, v_sc, v_sy, v_sx,
    out_sb, out_sc, out_sy, out_sx, dq_sb, dq_sc, dq_sy, dq_sx,
    heads, height, width, out_height, out_width, step_y, step_x, to_log2,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, REACH: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    image, head, tile_y, tile_x = locate(heads, TILE_H, TILE_W)
    query = tl.arange(0, TILE_H * TILE_W)
    out_y, out_x = tile_y + query % TILE_H, tile_x + query // TILE_H
    owned = (out_y < out_height) & (out_x < out_width)
    query_y, query_x = tl.minimum(out_y, out_height - 1) * STRIDE, tl.minimum(out_x, out_width - 1) * STRIDE
    channel = tl.arange(0, D)
    real = channel < HEAD_DIM
    mine = owned[:, None] & real[None, :]

    grad_ptr += image * grad_sb + head * HEAD_DIM * grad_sc
    q_ptr += image * q_sb + head * HEAD_DIM * q_sc
    k_ptr += image * k_sb + head * HEAD_DIM * k_sc
    v_ptr += image * v_sb + head * HEAD_DIM * v_sc
    out_ptr += image * out_sb + head * HEAD_DIM * out_sc
    dq_ptr += image * dq_sb + head * HEAD_DIM * dq_sc
    lse_ptr += (image * heads + head) * out_height * out_width
    delta_ptr += (image * heads + head) * out_height * out_width

    grad = tl.load(grad_ptr + pixel_offsets(out_y, out_x, channel, grad_sc, grad_sy, grad_sx, WIDE), mine, other=0.0)
    out = tl.load(out_ptr + pixel_offsets(out_y, out_x, channel, out_sc, out_sy, out_sx, WIDE), mine, other=0.0)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)  # (M,)
    tl.store(delta_ptr + out_y * out_width + out_x, delta, mask=owned)
    # an infinite lse gives a query outside the map weight zero: with none, its exponentials could overflow
    lse = tl.load(lse_ptr + out_y * out_width + out_x, mask=owned, other=-NEVER) * (1.0 / LN2)
    q = tl.load(q_ptr + pixel_offsets(query_y, query_x, channel, q_sc, q_sy, q_sx, WIDE), real[None, :], other=0.0)
    position_x = tl.load(position_ptr + 2 * channel, mask=real, other=0.0).to(tl.float32)
    position_y = tl.load(position_ptr + 2 * channel + 1, mask=real, other=0.0).to(tl.float32)
    u_x = tl.sum(q.to(tl.float32) * position_x[None, :], 1) * to_log2  # (M,)
    u_y = tl.sum(q.to(tl.float32) * position_y[None, :], 1) * to_log2

    slot = tl.arange(0, ROWS * COLS)
    first_x = tl.maximum(tile_x * STRIDE - REACH, 0)
    key_x = first_x + slot % COLS
    first_y = tl.maximum(tile_y * STRIDE - REACH, 0)
    end_y = tl.minimum((tile_y + TILE_H - 1) * STRIDE + REACH + 1, height)
    column_term = log2_count(query_x[:, None], key_x[None, :], width, REACH, DILATION)
    column_term -= u_x[:, None] * (key_x * step_x - 1.0)[None, :] + lse[:, None]  # (M, N)

    dq = tl.zeros([TILE_H * TILE_W, D], tl.float32)
    moment = tl.zeros([TILE_H * TILE_W, ROWS * COLS], tl.float32)  # sum of ds over rows
    moment_y = tl.zeros([TILE_H * TILE_W, ROWS * COLS], tl.float32)  # sum of ds * (rows from first_y) over rows
    for start in range(first_y, end_y, ROWS):
        key_y = start + slot // COLS
        inside = ((key_y < height) & (key_x < width))[:, None] & real[None, :]
        k = tl.load(k_ptr + pixel_offsets(key_y, key_x, channel, k_sc, k_sy, k_sx, WIDE), mask=inside, other=0.0)
        v = tl.load(v_ptr + pixel_offsets(key_y, key_x, channel, v_sc, v_sy, v_sx, WIDE), mask=inside, other=0.0)
        row_term = log2_count(query_y[:, None], key_y[None, :], height, REACH, DILATION)
        row_term -= u_y[:, None] * (key_y * step_y - 1.0)[None, :]
        logits = dot(q, tl.trans(k), tl.zeros_like(column_term), PRECISION) * to_log2 + (row_term + column_term)
        weight = tl.exp2(logits)  # (M, N)
        d_weight = dot(grad, tl.trans(v), tl.zeros_like(weight) - delta[:, None], PRECISION)
        d_logit = weight * d_weight
        moment += d_logit
        moment_y += d_logit * (key_y - first_y).to(tl.float32)[None, :]
        dq = dot(d_logit, k, dq, PRECISION)

    moment_x = moment * (slot % COLS).to(tl.float32)[None, :]
    total = tl.sum(moment, 1)
    t_x = (tl.sum(moment_x, 1) - total * (query_x - first_x).to(tl.float32)) * step_x  # (M,)
    t_y = (tl.sum(moment_y, 1) - total * (query_y - first_y).to(tl.float32)) * step_y
    if SCALED:
        factor = tl.load(factor_ptr).to(tl.float32)
        t_x, t_y, dq = factor * t_x, factor * t_y, factor * dq
    dq -= t_x[:, None] * position_x[None, :] + t_y[:, None] * position_y[None, :]
    dq *= to_log2 * LN2
    dq_at = pixel_offsets(query_y, query_x, channel, dq_sc, dq_sy, dq_sx, WIDE)
    tl.store(dq_ptr + dq_at, dq.to(dq_ptr.dtype.element_ty), mask=mine)
    program = (image * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    d_position_ptr += program * (2 * D)
    tl.store(d_position_ptr + 2 * channel, tl.sum(q.to(tl.float32) * t_x[:, None], 0))
    tl.store(d_position_ptr + 2 * channel + 1, tl.sum(q.to(tl.float32) * t_y[:, None], 0))


@triton.jit
def _key_gradient_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, position_ptr, lse_ptr, delta_ptr, factor_ptr, dk_ptr, dv_ptr,
    grad_sb, grad_sc, grad_sy, grad_sx, q_sb, q_sc, q_sy, q_sx, k_sb, k_sc, k_sy, k_sx, v_sb, v_sc, v_sy, v_sx,
    dk_sb, dk_sc, dk_sy, dk_sx, dv_sb, dv_sc, dv_sy, dv_sx,
    heads, height, width, out_height, out_width, step_y, step_x, to_log2,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, REACH: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    image, head, tile_y, tile_x = locate(heads, TILE_H, TILE_W)
    key = tl.arange(0, TILE_H * TILE_W)
    key_y, key_x = tile_y + key % TILE_H, tile_x + key // TILE_H
    channel = tl.arange(0, D)
    real = channel < HEAD_DIM
    mine = ((key_y < height) & (key_x < width))[:, None] & real[None, :]

    grad_ptr += image * grad_sb + head * HEAD_DIM * grad_sc
    q_ptr += image * q_sb + head * HEAD_DIM * q_sc
    k_ptr += image * k_sb + head * HEAD_DIM * k_sc
    v_ptr += image * v_sb + head * HEAD_DIM * v_sc
    dk_ptr += image * dk_sb + head * HEAD_DIM * dk_sc
    dv_ptr += image * dv_sb + head * HEAD_DIM * dv_sc
    lse_ptr += (image * heads + head) * out_height * out_width
    delta_ptr += (image * heads + head) * out_height * out_width

    k = tl.load(k_ptr + pixel_offsets(key_y, key_x, channel, k_sc, k_sy, k_sx, WIDE), mask=mine, other=0.0)
    v = tl.load(v_ptr + pixel_offsets(key_y, key_x, channel, v_sc, v_sy, v_sx, WIDE), mask=mine, other=0.0)
    position_x = tl.load(position_ptr + 2 * channel, mask=real, other=0.0).to(tl.float32)
    position_y = tl.load(position_ptr + 2 * channel + 1, mask=real, other=0.0).to(tl.float32)
    key_px, key_py = key_x * step_x - 1.0, key_y * step_y - 1.0
    shift = key_px[:, None] * position_x[None, :] + key_py[:, None] * position_y[None, :]
    k = (k.to(tl.float32) - shift).to(k.dtype)  # k - P p: keys stay put here, so this is done once, not per logit

    slot = tl.arange(0, ROWS * COLS)
    out_x = tl.maximum((tile_x - REACH + STRIDE - 1) // STRIDE, 0) + slot % COLS
    first_y = tl.maximum((tile_y - REACH + STRIDE - 1) // STRIDE, 0)
    end_y = tl.minimum((tile_y + TILE_H - 1 + REACH) // STRIDE + 1, out_height)
    query_x = out_x * STRIDE
    column_term = log2_count(query_x[None, :], key_x[:, None], width, REACH, DILATION)  # (M, N)

    dk = tl.zeros([TILE_H * TILE_W, D], tl.float32)
    dv = tl.zeros([TILE_H * TILE_W, D], tl.float32)
    for start in range(first_y, end_y, ROWS):
        out_y = start + slot // COLS
        query_y = out_y * STRIDE
        exists = (out_y < out_height) & (out_x < out_width)
        inside = exists[:, None] & real[None, :]
        q_at = pixel_offsets(query_y, query_x, channel, q_sc, q_sy, q_sx, WIDE)
        q = tl.load(q_ptr + q_at, mask=inside, other=0.0)  # (N, D)
        grad_at = pixel_offsets(out_y, out_x, channel, grad_sc, grad_sy, grad_sx, WIDE)
        grad = tl.load(grad_ptr + grad_at, mask=inside, other=0.0)
        # an infinite lse gives a query outside the map weight zero
        lse = tl.load(lse_ptr + out_y * out_width + out_x, mask=exists, other=-NEVER) * (1.0 / LN2)
        delta = tl.load(delta_ptr + out_y * out_width + out_x, mask=exists, other=0.0)
        row_term = log2_count(query_y[None, :], key_y[:, None], height, REACH, DILATION)
        bias = row_term + (column_term - lse[None, :])
        logits = dot(k, tl.trans(q), tl.zeros_like(column_term), PRECISION) * to_log2 + bias
        # no weight is above 1, but k - P p is rounded otherwise than the forward's logits, which may be large
        weight = tl.exp2(tl.minimum(logits, 0.0))  # (M, N)
        d_weight = dot(v, tl.trans(grad), tl.zeros_like(weight) - delta[None, :], PRECISION)
        dv = dot(weight, grad, dv, PRECISION)
        dk = dot(weight * d_weight, q, dk, PRECISION)

    dk *= to_log2 * LN2
    if SCALED:
        factor = tl.load(factor_ptr).to(tl.float32)
        dk, dv = factor * dk, factor * dv
    dk_at = pixel_offsets(key_y, key_x, channel, dk_sc, dk_sy, dk_sx, WIDE)
    dv_at = pixel_offsets(key_y, key_x, channel, dv_sc, dv_sy, dv_sx, WIDE)
    tl.store(dk_ptr + dk_at, dk.to(dk_ptr.dtype.element_ty), mask=mine)
    tl.store(dv_ptr + dv_at, dv.to(dv_ptr.dtype.element_ty), mask=mine)


def query_gradient(
    geometry: Geometry,
    maps: tuple[Tensor, ...],
    position_weight: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Write dq; return delta (B, N, Ho, Wo) and dP (d, 2), both in float32."""
    if geometry.window.stride > 1:
        dq.zero_()  # the kernel visits queries only
    delta = torch.empty_like(lse)
    arguments = geometry.arguments(geometry.query_tile("dq"), geometry.out_size, *maps, out, dq)
    shares = torch.empty((math.prod(arguments["grid"]), arguments["D"], 2), dtype=torch.float32, device=dq.device)
    strides = [step for tensor in (*maps, out, dq) for step in tensor.stride()]
    launch(_query_gradient_kernel, arguments, *maps, position_weight, out, lse, lse if factor is None else factor,
           dq, delta, shares, *strides, SCALED=factor is not None)  # fmt: skip
    return delta, shares.sum(0)[: geometry.head_dim] * -geometry.scale


def key_gradient(
    geometry: Geometry,
    maps: tuple[Tensor, ...],
    position_weight: Tensor,
    lse: Tensor,
    delta: Tensor,
    dk: Tensor,
    dv: Tensor,
    factor: Tensor | None = None,
) -> None:
    """Write dk and dv."""
    arguments = geometry.arguments(geometry.key_tile("dkv"), geometry.size, *maps, dk, dv)
    strides = [step for tensor in (*maps, dk, dv) for step in tensor.stride()]
    launch(_key_gradient_kernel, arguments, *maps, position_weight, lse, delta, lse if factor is None else factor,
           dk, dv, *strides, SCALED=factor is not None)  # fmt: skip


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_weight: Tensor,
    out: Tensor,
    lse: Tensor,
    window: Window,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv, dP) of `forward`, from its inputs and both outputs; no logit was stored.

    dq, dk and dv have the layouts of q, k and v.
    """
    dq, dk, dv = (empty_like_layout(m, *m.shape[2:]) for m in (q, k, v))
    d_position, _ = backward_into((dq, dk, dv), (grad_out, q, k, v), position_weight, out, lse, window)
    return dq, dk, dv, d_position.to(position_weight.dtype)


def backward_into(
    grads: tuple[Tensor, Tensor, Tensor],
    maps: tuple[Tensor, Tensor, Tensor, Tensor],
    position_weight: Tensor,
    out: Tensor,
    lse: Tensor,
    window: Window,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Write the gradients of q, k and v to `grads`; return that of the position weight and delta, both in float32.

    Args:
        grads: Tensors of the maps' shape, any strides.
        maps: The gradient of the output, q, k and v.
        factor: A scalar tensor by which the output was multiplied, None for 1. Its own gradient is delta's sum.
    """
    geometry = Geometry.of(maps[1], position_weight, window)
    weight = position_weight.contiguous()
    dq, dk, dv = grads
    with device_guard(dq):
        delta, d_position = query_gradient(geometry, maps, weight, out, lse, dq, factor)
        key_gradient(geometry, maps, weight, lse, delta, dk, dv, factor)
    return d_position, delta
