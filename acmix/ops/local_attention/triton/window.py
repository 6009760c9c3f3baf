"""Device functions that both passes of local attention share: the reflected window, positions, tiles and the dot.

Letters in shapes: M the pixels of the tile a program owns, N the pixels it streams past them in one step,
D the head dimension padded to a power of two.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
NEVER = tl.constexpr(float("-inf"))
LN2 = tl.constexpr(0.6931471805599453)
LOG2_3 = tl.constexpr(1.584962500721156)


@triton.jit
def log2_count(query, key, length, REACH: tl.constexpr, DILATION: tl.constexpr):
    """log2 of how often the window around `query` meets pixel `key` on an axis reflected at 0 and `length - 1`.

    A window that hangs over a border sees some pixels again in the mirror, up to three times in all, so attention
    over the real pixels with this term added to the logits is attention over the reflection-padded ones.
    -inf where the window never meets the pixel or the pixel lies outside the map. `REACH` < `length`.
    """
    # Everything that depends on one pixel alone stays a row or a column: only five operations are done per pair.
    far = 4 * length + 4 * REACH
    from_low = tl.where(key > 0, key, far) <= REACH - query
    from_high = tl.where(key < length - 1, key, -far) >= 2 * (length - 1) - REACH - query
    direct = tl.abs(tl.where(key < length, key, far) - query) <= REACH
    if DILATION > 1:
        from_low = from_low & ((key + query) % DILATION == 0)
        from_high = from_high & ((2 * (length - 1) - key - query) % DILATION == 0)
        direct = direct & (tl.abs(key - query) % DILATION == 0)
        count = direct.to(tl.int32) + from_low.to(tl.int32) + from_high.to(tl.int32)
        return tl.where(count == 0, NEVER, tl.where(count == 1, 0.0, tl.where(count == 2, 1.0, LOG2_3)))
    # Without dilation a mirrored pixel is always seen directly too.
    mirrored = tl.where(from_low & from_high, LOG2_3, tl.where(from_low | from_high, 1.0, 0.0))
    return tl.where(direct, mirrored, NEVER)


@triton.jit
def locate(heads, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """(image, head, first row, first column) of this program's tile; the grid is (tiles_x * heads, tiles_y, batch).

    Heads run fastest: with channels_last the heads of a pixel share a cache line, so they should run together.
    """
    tile_x = tl.program_id(0) // heads
    head = tl.program_id(0) - tile_x * heads
    return tl.program_id(2).to(tl.int64), head.to(tl.int64), tl.program_id(1) * TILE_H, tile_x * TILE_W


@triton.jit
def pixel_offsets(row, column, channel, stride_c, stride_y, stride_x, WIDE: tl.constexpr):
    """(pixels, D) element offsets inside one head of one image; 64-bit when the launcher finds that 32 overflow."""
    if WIDE:
        row, column, channel = row.to(tl.int64), column.to(tl.int64), channel.to(tl.int64)
    return (row * stride_y + column * stride_x)[:, None] + (channel * stride_c)[None, :]


@triton.jit
def dot(left, right, start, PRECISION: tl.constexpr):
    """left @ right + start, accumulated in float32, with `left` rounded to the dtype of `right` first.

    The interpreter multiplies bfloat16 wrongly and truncates instead of rounding, so there the operands are widened.
    """
    if INTERPRETED:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), acc=start, input_precision=PRECISION)
    return tl.dot(left.to(right.dtype), right, acc=start, input_precision=PRECISION)
