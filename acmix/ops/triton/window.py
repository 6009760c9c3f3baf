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
    direct = tl.abs(key - query)
    low = key + query
    high = 2 * (length - 1) - low
    seen = ((direct <= REACH) & (key < length)).to(tl.int32)
    mirrored_low = (key > 0) & (low <= REACH)
    mirrored_high = (key < length - 1) & (high <= REACH)
    if DILATION > 1:
        seen = seen & (direct % DILATION == 0).to(tl.int32)
        mirrored_low = mirrored_low & (low % DILATION == 0)
        mirrored_high = mirrored_high & (high % DILATION == 0)
    count = seen + mirrored_low.to(tl.int32) + mirrored_high.to(tl.int32)
    return tl.where(count == 0, NEVER, tl.where(count == 1, 0.0, tl.where(count == 2, 1.0, LOG2_3)))


@triton.jit
def locate(heads, tiles_y, tiles_x, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """(image, head, first row, first column) of this program's tile.

    Heads run fastest: with channels_last the heads of a pixel share a cache line, so they should run together.
    """
    program = tl.program_id(0)
    head = program % heads
    tile = program // heads % (tiles_y * tiles_x)
    image = program // (heads * tiles_y * tiles_x)
    return image.to(tl.int64), head.to(tl.int64), tile // tiles_x * TILE_H, tile % tiles_x * TILE_W


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
