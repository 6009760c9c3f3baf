"""Kernels of the folded convolution path and their launchers.

The path is a grouped convolution of d small groups: 3N maps in, N out. Tensor cores would multiply mostly zeros, so
these kernels multiply in plain float32, and read q, k and v where they lie: no copy brings the maps of a group side by
side. Forward and the maps' gradient are one kernel, which takes every source map to every target map; the weight's
gradient is another, whose shares are summed in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from acmix.ops.gpu import device_guard
from acmix.ops.implementations import Window
from acmix.ops.shift_conv.triton.tiles import map_tile, weight_tile


@triton.jit
def _locate(pixel, height, width):
    """(image, row, column) of pixels counted through the whole batch."""
    row, x = pixel // width, pixel % width
    return row // height, row % height, x


@triton.jit
def _offsets(image, y, x, by_image, by_row, by_pixel, WIDE: tl.constexpr):
    """Where pixels begin, (pixels, 1), in elements; 64-bit when the launcher finds that 32 overflow."""
    if WIDE:
        image, y, x = image.to(tl.int64), y.to(tl.int64), x.to(tl.int64)
    return (image * by_image + y * by_row + x * by_pixel)[:, None]


@triton.jit
def _load(ptr, at, channel, first, NUMBER: tl.constexpr, COUNT: tl.constexpr, HEAD_DIM: tl.constexpr, inside):
    """Channels of map `first + NUMBER` of COUNT in float32, zeros outside and where there is no such map."""
    mask = inside[:, None] & ((channel < HEAD_DIM) & (first + NUMBER < COUNT))[None, :]
    at += (channel + (first + NUMBER) * HEAD_DIM)[None, :]
    return tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _weights(ptr, channel, first, step, NUMBER: tl.constexpr, COUNT: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The weights (1, channels) of target `first + NUMBER` of COUNT."""
    mask = (channel < HEAD_DIM) & (first + NUMBER < COUNT)
    return tl.load(ptr + channel + (first + NUMBER) * step, mask=mask, other=0.0)[None, :]


@triton.jit
def _write(
    target_ptr, at, added_ptr, added_at, factor, total, channel, first, inside,
    NUMBER: tl.constexpr, COUNT: tl.constexpr, HEAD_DIM: tl.constexpr, INTERLEAVED: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """Store target `first + NUMBER` of COUNT, plus what lies at the same place of another map if ADDED."""
    if INTERLEAVED:
        lane = (channel * COUNT + first + NUMBER)[None, :]
    else:
        lane = (channel + (first + NUMBER) * HEAD_DIM)[None, :]
    mask = inside[:, None] & ((channel < HEAD_DIM) & (first + NUMBER < COUNT))[None, :]
    if ADDED:
        total += factor * tl.load(added_ptr + added_at + lane, mask=mask, other=0.0).to(tl.float32)
    tl.store(target_ptr + at + lane, total.to(target_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _maps_kernel(
    source_ptr, table_ptr, target_ptr, added_ptr, factor_ptr,
    source_sb, source_sy, source_sx, target_sb, target_sy, target_sx, added_sb, added_sy, added_sx,
    source_height, source_width, target_height, target_width, pixels, parts, blocks,
    tap_step, source_step, target_step,
    SOURCES: tl.constexpr, TARGETS: tl.constexpr, HEAD_DIM: tl.constexpr,
    K: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, TRANSPOSED: tl.constexpr,
    ADDED: tl.constexpr, SCALED: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, UNROLL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # Forward, the channels of the targets lie (channel, map) as the path gives them; those of gradients (map, channel).
    INTERLEAVED: tl.constexpr = not TRANSPOSED
    REACH: tl.constexpr = DILATION * (K // 2)
    part = tl.program_id(0) % parts
    first = part // blocks * 4
    channel = part % blocks * CHANNELS + tl.arange(0, CHANNELS)
    pixel = tl.program_id(0) // parts * PIXELS + tl.arange(0, PIXELS)
    image, y, x = _locate(pixel, target_height, target_width)

    total_0 = tl.zeros([PIXELS, CHANNELS], tl.float32)
    total_1, total_2, total_3 = total_0, total_0, total_0
    for tap in range(K * K):
        if TRANSPOSED:
            from_y, from_x = y + REACH - tap // K * DILATION, x + REACH - tap % K * DILATION
            inside = (from_y >= 0) & (from_x >= 0) & (from_y % STRIDE == 0) & (from_x % STRIDE == 0)
            from_y, from_x = from_y // STRIDE, from_x // STRIDE
        else:
            from_y, from_x = y * STRIDE + tap // K * DILATION - REACH, x * STRIDE + tap % K * DILATION - REACH
            inside = (from_y >= 0) & (from_x >= 0)
        inside = inside & (from_y < source_height) & (from_x < source_width) & (pixel < pixels)
        at = _offsets(image, from_y, from_x, source_sb, source_sy, source_sx, WIDE)
        for source in tl.range(0, SOURCES, loop_unroll_factor=UNROLL):
            values = _load(source_ptr, at, channel, source, 0, SOURCES, HEAD_DIM, inside)
            weights = table_ptr + tap * tap_step + source * source_step
            total_0 += values * _weights(weights, channel, first, target_step, 0, TARGETS, HEAD_DIM)
            if TARGETS > 1:
                total_1 += values * _weights(weights, channel, first, target_step, 1, TARGETS, HEAD_DIM)
            if TARGETS > 2:
                total_2 += values * _weights(weights, channel, first, target_step, 2, TARGETS, HEAD_DIM)
            if TARGETS > 3:
                total_3 += values * _weights(weights, channel, first, target_step, 3, TARGETS, HEAD_DIM)

    inside = pixel < pixels
    at = _offsets(image, y, x, target_sb, target_sy, target_sx, WIDE)
    added_at = _offsets(image, y, x, added_sb, added_sy, added_sx, WIDE)
    factor = 1.0
    if SCALED:
        factor = tl.load(factor_ptr).to(tl.float32)
    if INTERLEAVED and TARGETS % 4 == 0:
        # the four maps of a channel are neighbours in memory: joined, they are stored in vectors
        together = tl.join(tl.join(total_0, total_2), tl.join(total_1, total_3))
        total = tl.reshape(together, (PIXELS, 4 * CHANNELS))
        number = tl.arange(0, 4 * CHANNELS)
        lane_channel = part % blocks * CHANNELS + number // 4
        lane = (lane_channel * TARGETS + first + number % 4)[None, :]
        mask = inside[:, None] & (lane_channel < HEAD_DIM)[None, :]
        if ADDED:
            total += factor * tl.load(added_ptr + added_at + lane, mask=mask, other=0.0).to(tl.float32)
        tl.store(target_ptr + at + lane, total.to(target_ptr.dtype.element_ty), mask=mask)
    else:
        _write(target_ptr, at, added_ptr, added_at, factor, total_0, channel, first, inside,
               0, TARGETS, HEAD_DIM, INTERLEAVED, ADDED)  # fmt: skip
        if TARGETS > 1:
            _write(target_ptr, at, added_ptr, added_at, factor, total_1, channel, first, inside,
                   1, TARGETS, HEAD_DIM, INTERLEAVED, ADDED)  # fmt: skip
        if TARGETS > 2:
            _write(target_ptr, at, added_ptr, added_at, factor, total_2, channel, first, inside,
                   2, TARGETS, HEAD_DIM, INTERLEAVED, ADDED)  # fmt: skip
        if TARGETS > 3:
            _write(target_ptr, at, added_ptr, added_at, factor, total_3, channel, first, inside,
                   3, TARGETS, HEAD_DIM, INTERLEAVED, ADDED)  # fmt: skip


@triton.jit
def _add_products(total_0, total_1, total_2, total_3, values, grad_0, grad_1, grad_2, grad_3):
    """What one source map adds to the weights that take it to four target maps."""
    return total_0 + values * grad_0, total_1 + values * grad_1, total_2 + values * grad_2, total_3 + values * grad_3


@triton.jit
def _write_shares(
    ptr, total_0, total_1, total_2, total_3, channel, source, first_grad,
    SOURCES: tl.constexpr, GRADS: tl.constexpr, HEAD_DIM: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    mask = (channel < HEAD_DIM) & (source < SOURCES)
    ptr += (source * (TAPS * HEAD_DIM) + channel) * GRADS + first_grad
    tl.store(ptr, tl.sum(total_0, 0), mask=mask)
    if GRADS > 1:
        tl.store(ptr + 1, tl.sum(total_1, 0), mask=mask & (first_grad + 1 < GRADS))
    if GRADS > 2:
        tl.store(ptr + 2, tl.sum(total_2, 0), mask=mask & (first_grad + 2 < GRADS))
    if GRADS > 3:
        tl.store(ptr + 3, tl.sum(total_3, 0), mask=mask & (first_grad + 3 < GRADS))


@triton.jit
def _weight_kernel(
    source_ptr, grad_ptr, shares_ptr,
    source_sb, source_sy, source_sx, grad_sb, grad_sy, grad_sx,
    source_height, source_width, grad_height, grad_width, pixels, steps, source_bundles, grad_bundles,
    SOURCES: tl.constexpr, GRADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    K: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    REACH: tl.constexpr = DILATION * (K // 2)
    # Taps run fastest: the programs that read the same pixels run together.
    part = tl.program_id(0)
    tap, part = part % (K * K), part // (K * K)
    source, part = part % source_bundles * 4, part // source_bundles
    target = part % grad_bundles * 4
    channel = part // grad_bundles * CHANNELS + tl.arange(0, CHANNELS)
    split = tl.program_id(1)

    total_00 = tl.zeros([PIXELS, CHANNELS], tl.float32)
    total_01, total_02, total_03 = total_00, total_00, total_00
    total_10, total_11, total_12, total_13 = total_00, total_00, total_00, total_00
    total_20, total_21, total_22, total_23 = total_00, total_00, total_00, total_00
    total_30, total_31, total_32, total_33 = total_00, total_00, total_00, total_00
    for step in range(steps):
        pixel = (split * steps + step) * PIXELS + tl.arange(0, PIXELS)
        image, y, x = _locate(pixel, grad_height, grad_width)
        from_y, from_x = y * STRIDE + tap // K * DILATION - REACH, x * STRIDE + tap % K * DILATION - REACH
        inside = (from_y >= 0) & (from_x >= 0) & (from_y < source_height) & (from_x < source_width) & (pixel < pixels)
        at = _offsets(image, y, x, grad_sb, grad_sy, grad_sx, WIDE)
        grad_0 = _load(grad_ptr, at, channel, target, 0, GRADS, HEAD_DIM, inside)
        grad_1 = _load(grad_ptr, at, channel, target, 1, GRADS, HEAD_DIM, inside)
        grad_2 = _load(grad_ptr, at, channel, target, 2, GRADS, HEAD_DIM, inside)
        grad_3 = _load(grad_ptr, at, channel, target, 3, GRADS, HEAD_DIM, inside)
        at = _offsets(image, from_y, from_x, source_sb, source_sy, source_sx, WIDE)
        values = _load(source_ptr, at, channel, source, 0, SOURCES, HEAD_DIM, inside)
        total_00, total_01, total_02, total_03 = _add_products(
            total_00, total_01, total_02, total_03, values, grad_0, grad_1, grad_2, grad_3
        )
        values = _load(source_ptr, at, channel, source, 1, SOURCES, HEAD_DIM, inside)
        total_10, total_11, total_12, total_13 = _add_products(
            total_10, total_11, total_12, total_13, values, grad_0, grad_1, grad_2, grad_3
        )
        values = _load(source_ptr, at, channel, source, 2, SOURCES, HEAD_DIM, inside)
        total_20, total_21, total_22, total_23 = _add_products(
            total_20, total_21, total_22, total_23, values, grad_0, grad_1, grad_2, grad_3
        )
        values = _load(source_ptr, at, channel, source, 3, SOURCES, HEAD_DIM, inside)
        total_30, total_31, total_32, total_33 = _add_products(
            total_30, total_31, total_32, total_33, values, grad_0, grad_1, grad_2, grad_3
        )

    TAPS: tl.constexpr = K * K
    shares_ptr += split.to(tl.int64) * (SOURCES * TAPS * HEAD_DIM * GRADS) + tap * (HEAD_DIM * GRADS)
    _write_shares(shares_ptr, total_00, total_01, total_02, total_03, channel, source, target,
                  SOURCES, GRADS, HEAD_DIM, TAPS)  # fmt: skip
    _write_shares(shares_ptr, total_10, total_11, total_12, total_13, channel, source + 1, target,
                  SOURCES, GRADS, HEAD_DIM, TAPS)  # fmt: skip
    _write_shares(shares_ptr, total_20, total_21, total_22, total_23, channel, source + 2, target,
                  SOURCES, GRADS, HEAD_DIM, TAPS)  # fmt: skip
    _write_shares(shares_ptr, total_30, total_31, total_32, total_33, channel, source + 3, target,
                  SOURCES, GRADS, HEAD_DIM, TAPS)  # fmt: skip


def forward(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, window: Window) -> Tensor:
    """Grouped convolution of q, k, v (B, N*d, H, W) with weight (N*d, 3N, k, k): (B, N*d, Ho, Wo), channels (d, N).

    The result is channels_last.
    """
    maps = side_by_side(q, k, v)
    out = _empty(maps, weight.shape[0], *window.out_size(*q.shape[2:]))
    forward_into(out, maps, weight, window)
    return out


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, window: Window
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, channels_last, and the weight."""
    maps, planar = side_by_side(q, k, v), as_maps(grad_out, _head_dim(weight, q.shape[1] + k.shape[1] + v.shape[1]))
    grads = [_empty(m, *m.shape[1:]) for m in (q, k, v)]
    backward_maps_into(grads, planar, weight, window)
    return grads[0], grads[1], grads[2], backward_weight(maps, planar, weight, window).to(weight.dtype)


def side_by_side(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k and v as one channels_last map: the one they are slices of, else a copy."""
    widths, start = [m.shape[1] for m in (q, k, v)], q.data_ptr()
    steps = (q.stride(0), 1, *q.stride()[2:])
    is_one = all(
        m.data_ptr() == start + sum(widths[:i]) * q.element_size() and m.stride()[2:] == steps[2:]
        and m.stride(0) == steps[0] and (m.stride(1) == 1 or m.shape[1] == 1)
        for i, m in enumerate((q, k, v)) if m.numel()
    )  # fmt: skip
    if is_one and q.numel() and steps[3] >= sum(widths):
        return q.as_strided((q.shape[0], sum(widths), *q.shape[2:]), steps)
    return torch.cat([m.permute(0, 2, 3, 1) for m in (q, k, v)], 3).permute(0, 3, 1, 2)


def as_maps(grad_out: Tensor, head_dim: int) -> Tensor:
    """A gradient of the output, channels (d, N), with channels (N, d) side by side at every pixel."""
    pixels = grad_out.permute(0, 2, 3, 1).unflatten(3, (head_dim, -1))
    return pixels.transpose(3, 4).contiguous().flatten(3).permute(0, 3, 1, 2)


def forward_into(
    out: Tensor, maps: Tensor, weight: Tensor, window: Window, added: Tensor | None = None, factor: Tensor | None = None
) -> None:
    """Write the convolution of `maps`, q, k and v side by side, to `out`, plus `factor` times `added` if given.

    Args:
        out, added: (B, N*d, Ho, Wo), the channels of a pixel adjacent.
        maps: As `side_by_side` gives them.
        weight: (N*d, M, k, k) for M maps.
        factor: Scalar tensor; None for 1.
    """
    table = _table(weight, _head_dim(weight, maps.shape[1]))
    by_tap, by_source, by_target, _ = table.stride()
    _launch_maps(maps, table, (by_tap, by_source, by_target), out, window, transposed=False, added=added, factor=factor)


def backward_maps_into(
    grads: list[Tensor], planar: Tensor, weight: Tensor, window: Window, *, accumulate: bool = False
) -> None:
    """Write the gradients of consecutive maps to `grads`, or add them to what is there.

    Args:
        grads: Tensors (B, widths, H, W), the channels of a pixel adjacent; together the M maps of the weight.
        planar: Gradient of the output as `as_maps` gives it.
    """
    head_dim = _head_dim(weight, sum(grad.shape[1] for grad in grads))
    table = _table(weight, head_dim)
    by_tap, by_target, by_source, _ = table.stride()
    for grad in grads:
        if grad.numel():
            added = grad if accumulate else None
            _launch_maps(planar, table, (by_tap, by_source, by_target), grad, window, transposed=True, added=added)
        table = table[:, grad.shape[1] // head_dim :]


def backward_weight(maps: Tensor, planar: Tensor, weight: Tensor, window: Window) -> Tensor:
    """Gradient of the weight, in float32, laid out as `fold` gives the weight. The same bits in every run."""
    head_dim = _head_dim(weight, maps.shape[1])
    outputs, sources = weight.shape[0] // head_dim, weight.shape[1]
    batch, _, height, width = planar.shape
    pixels = batch * height * width
    tile = weight_tile(head_dim)
    source_bundles, grad_bundles = -(-sources // 4), -(-outputs // 4)
    parts = -(-head_dim // tile.channels) * grad_bundles * source_bundles * weight.shape[2] ** 2
    splits = tile.splits(pixels, parts)
    steps = -(-pixels // (splits * tile.pixels))
    shares = torch.empty((splits, sources, *weight.shape[2:], weight.shape[0]), dtype=torch.float32, device=maps.device)
    with device_guard(maps):
        _weight_kernel[(parts, splits)](
            maps, planar, shares, *_steps(maps), *_steps(planar), *maps.shape[2:], height, width, pixels, steps,
            source_bundles, grad_bundles,
            SOURCES=sources, GRADS=outputs, HEAD_DIM=head_dim,
            K=window.kernel_size, STRIDE=window.stride, DILATION=window.dilation,
            PIXELS=tile.pixels, CHANNELS=tile.channels, WIDE=_is_wide(maps, planar),
            num_warps=tile.warps,
        )  # fmt: skip
    return shares.sum(0).permute(3, 0, 1, 2)


def _launch_maps(
    source: Tensor,
    table: Tensor,
    table_steps: tuple[int, int, int],
    target: Tensor,
    window: Window,
    *,
    transposed: bool,
    added: Tensor | None = None,
    factor: Tensor | None = None,
) -> None:
    """table: a weight of `_table` for every tap, source, target and channel; table_steps: between the first three."""
    batch, channels, height, width = target.shape
    head_dim = table.shape[-1]
    sources, targets = source.shape[1] // head_dim, channels // head_dim
    tile = map_tile(head_dim)
    pixels = batch * height * width
    blocks = -(-head_dim // tile.channels)
    parts = blocks * -(-targets // 4)
    with device_guard(source):
        _maps_kernel[(parts * -(-pixels // tile.pixels),)](
            source, table, target, target if added is None else added, table if factor is None else factor,
            *_steps(source), *_steps(target), *_steps(target if added is None else added),
            *source.shape[2:], height, width, pixels, parts, blocks, *table_steps,
            SOURCES=sources, TARGETS=targets, HEAD_DIM=head_dim,
            K=window.kernel_size, STRIDE=window.stride, DILATION=window.dilation, TRANSPOSED=transposed,
            ADDED=added is not None, SCALED=factor is not None,
            PIXELS=tile.pixels, CHANNELS=tile.channels, UNROLL=min(sources, tile.unroll),
            WIDE=_is_wide(source, target), num_warps=tile.warps,
        )  # fmt: skip


def _table(weight: Tensor, head_dim: int) -> Tensor:
    """The weight (N*d, M, k, k), rows (d, N), as (taps, M, N, d) in float32."""
    return weight.float().unflatten(0, (head_dim, -1)).flatten(3).permute(3, 2, 1, 0).contiguous()


def _steps(maps: Tensor) -> tuple[int, int, int]:
    """Elements between images, rows and pixels."""
    return maps.stride(0), maps.stride(2), maps.stride(3)


def _is_wide(*maps: Tensor) -> bool:
    """Whether an offset to a pixel can leave the range of int32."""
    return any(sum(m.shape[axis] * abs(m.stride(axis)) for axis in range(4)) >= 2**31 for m in maps)


def _empty(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    size = (like.shape[0], channels, height, width)
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _head_dim(weight: Tensor, channels: int) -> int:
    """d, where the maps of the weight have this many channels together."""
    return channels // weight.shape[1]
