"""Window attention for another size of image: other windows, their masks, and position biases interpolated for them."""

import math
import warnings

import torch
from timm.layers import resize_rel_pos_bias_table
from torch import Tensor, nn

from acmix.layers import WindowAttention


def set_windows(
    attention: WindowAttention, window_size: tuple[int, int], shift: tuple[int, int], resolution: tuple[int, int]
) -> None:
    """Give a window attention other windows, as if it had been built with these arguments.

    The position biases are kept where the windows stay as they are, else interpolated.
    """
    with torch.random.fork_rng([]):  # what it draws for its parameters is not used
        built = WindowAttention(attention.heads, attention.head_dim, window_size, shift, resolution)
    table = attention.relative_position_bias_table
    if window_size != attention.window_size:
        resized = resize_bias_table(table.detach(), window_size, attention.window_size)
        attention.relative_position_bias_table = nn.Parameter(resized, table.requires_grad)
    attention.window_size, attention.shift, attention.mask_resolution = window_size, shift, built.mask_resolution
    attention.relative_position_index = built.relative_position_index.to(table.device)
    attention.shift_mask = None if built.shift_mask is None else built.shift_mask.to(table)


def resize_bias_table(table: Tensor, window_size: tuple[int, int], made_for: tuple[int, int] | None = None) -> Tensor:
    """A relative position bias table ((2h - 1) · (2w - 1), heads), interpolated as timm does for other windows.

    Args:
        table: The table.
        window_size: (h, w) of the windows that it is to serve.
        made_for: (h, w) of the windows that it was made for; None takes them to be square.

    Raises:
        ValueError: for a table that is not that of a square window, where `made_for` is None.
    """
    new = 2 * window_size[0] - 1, 2 * window_size[1] - 1
    if made_for is None and len(table) == new[0] * new[1]:
        return table
    old = (math.isqrt(len(table)),) * 2 if made_for is None else (2 * made_for[0] - 1, 2 * made_for[1] - 1)
    if old[0] * old[1] != len(table):
        raise ValueError(
            f"a table of {len(table)} position biases is not that of a square window, and no other can be "
            "interpolated; use the image size that it was made for"
        )
    heads = table.shape[1]
    if table.is_meta:
        return table.new_empty(new[0] * new[1], heads)
    maps = table.float().cpu().view(*old, heads).permute(2, 0, 1).contiguous()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of how timm indexes
        resized = resize_rel_pos_bias_table(maps, window_size, (heads, *new))
    return resized.permute(1, 2, 0).reshape(-1, heads).to(table)
