"""Forward kernel of local attention and its launcher.

One program owns a small tile of queries of one head and streams the rows of keys that their windows touch through the
tensor cores, with a running softmax in powers of two. What a logit adds to the content term splits by axis,

    logit(i, j) = scale (q_i . k_j - u_i . p_j) + log count_y(i, j) + log count_x(i, j)        u_i = P^T q_i

so positions, reflection and the edge of the window cost one addition per logit, and no padded copy exists.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from acmix.ops.gpu import device_guard
from acmix.ops.implementations import Window
from acmix.ops.local_attention.triton.launch import Geometry, launch
from acmix.ops.local_attention.triton.window import LN2, dot, locate, log2_count, pixel_offsets
from acmix.ops.maps import empty_like_layout


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, position_ptr, out_ptr, lse_ptr,
    q_sb, q_sc, q_sy, q_sx, k_sb, k_sc, k_sy, k_sx, v_sb, v_sc, v_sy, v_sx, out_sb, out_sc, out_sy, out_sx,
    heads, height, width, out_height, out_width, step_y, step_x, to_log2,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, REACH: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    image, head, tile_y, tile_x = locate(heads, TILE_H, TILE_W)
    # Rows of the tile run fastest: the queries one thread holds then share a map row, and with it the row term below.
    query = tl.arange(0, TILE_H * TILE_W)
    out_y, out_x = tile_y + query % TILE_H, tile_x + query // TILE_H
    owned = (out_y < out_height) & (out_x < out_width)
    query_y, query_x = tl.minimum(out_y, out_height - 1) * STRIDE, tl.minimum(out_x, out_width - 1) * STRIDE
    channel = tl.arange(0, D)
    real = channel < HEAD_DIM

    q_ptr += image * q_sb + head * HEAD_DIM * q_sc
    k_ptr += image * k_sb + head * HEAD_DIM * k_sc
    v_ptr += image * v_sb + head * HEAD_DIM * v_sc
    q_at = pixel_offsets(query_y, query_x, channel, q_sc, q_sy, q_sx, WIDE)
    q = tl.load(q_ptr + q_at, mask=real[None, :], other=0.0)  # (M, D)
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
    column_term -= u_x[:, None] * (key_x * step_x - 1.0)[None, :]  # (M, N)

    highest = tl.full([TILE_H * TILE_W], -3.0e38, tl.float32)  # finite, so that a row masked so far subtracts cleanly
    total = tl.zeros([TILE_H * TILE_W], tl.float32)
    mean = tl.zeros([TILE_H * TILE_W, D], tl.float32)
    for start in range(first_y, end_y, ROWS):
        key_y = start + slot // COLS
        inside = ((key_y < height) & (key_x < width))[:, None] & real[None, :]
        k = tl.load(k_ptr + pixel_offsets(key_y, key_x, channel, k_sc, k_sy, k_sx, WIDE), mask=inside, other=0.0)
        v = tl.load(v_ptr + pixel_offsets(key_y, key_x, channel, v_sc, v_sy, v_sx, WIDE), mask=inside, other=0.0)
        row_term = log2_count(query_y[:, None], key_y[None, :], height, REACH, DILATION)
        row_term -= u_y[:, None] * (key_y * step_y - 1.0)[None, :]
        logits = dot(q, tl.trans(k), tl.zeros_like(column_term), PRECISION) * to_log2 + (row_term + column_term)
        higher = tl.maximum(highest, tl.max(logits, 1))
        weight = tl.exp2(logits - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weight, 1)
        mean = dot(weight, v, mean * shrink[:, None], PRECISION)
        highest = higher

    out_ptr += image * out_sb + head * HEAD_DIM * out_sc
    out_at = pixel_offsets(out_y, out_x, channel, out_sc, out_sy, out_sx, WIDE)
    tl.store(
        out_ptr + out_at, (mean / total[:, None]).to(out_ptr.dtype.element_ty), mask=owned[:, None] & real[None, :]
    )
    lse_ptr += (image * heads + head) * out_height * out_width
    lse = (highest + tl.log2(total)) * LN2
    tl.store(lse_ptr + out_y * out_width + out_x, lse, mask=owned)


def forward(q: Tensor, k: Tensor, v: Tensor, position_weight: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """Output (B, N*d, Ho, Wo) in q's dtype and layout, and the logits' log-sum-exp (B, N, Ho, Wo), float32, nats.

    The log-sum-exp leaves out what cancels in the softmax (the query's own position); `backward` expects it so.
    Arguments as in the public operation, which has checked them and what the kernels can run.
    """
    geometry = Geometry.of(q, position_weight, window)
    out_size = geometry.out_size
    out = empty_like_layout(q, *out_size)
    lse = torch.empty((geometry.batch, geometry.heads, *out_size), dtype=torch.float32, device=q.device)
    arguments = geometry.arguments(geometry.query_tile("forward"), out_size, q, k, v, out)
    strides = (*q.stride(), *k.stride(), *v.stride(), *out.stride())
    with device_guard(q):
        launch(_forward_kernel, arguments, q, k, v, position_weight.contiguous(), out, lse, *strides)
    return out, lse
