"""The operations of the ACmix block in plain eager torch, for any floating-point dtype: the specification.

Every fast implementation is tested against this file in float64. It follows the paper (section 4) literally, without
the identities that the fast implementations use, and favours reading over speed.

Shape legend: B batch, N heads, d head width, H x W map, K window, s stride, Ho = ceil(H / s), Wo = ceil(W / s).
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def positions(height: int, width: int, like: Tensor) -> Tensor:
    """The position of every pixel as (x, y) in [-1, 1]: shape (2, H, W), in float32 or in float64 where `like` is."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    x = torch.linspace(-1.0, 1.0, width, dtype=dtype, device=like.device)
    y = torch.linspace(-1.0, 1.0, height, dtype=dtype, device=like.device)
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)])


def _window(maps: Tensor, kernel_size: int, stride: int, dilation: int) -> Iterator[Tensor]:
    """Yield the K² members of every query's window, row by row: views (..., Ho, Wo) of one reflection-padded map."""
    height, width = maps.shape[-2:]
    pad = dilation * (kernel_size // 2)
    flat = maps.reshape(-1, 1, height, width)
    padded = F.pad(flat, (pad, pad, pad, pad), mode="reflect").unflatten(0, maps.shape[:-2]).squeeze(-3)
    for dy in range(0, kernel_size * dilation, dilation):
        for dx in range(0, kernel_size * dilation, dilation):
            yield padded[..., dy : dy + height : stride, dx : dx + width : stride]


def _fitting(kernel_size: int, dilation: int, maps: Tensor) -> int:
    """The largest odd window up to K whose reach is less than the shorter side of the maps."""
    return min(kernel_size, 2 * ((min(maps.shape[-2:]) - 1) // dilation) + 1)


def window_positions(
    height: int, width: int, kernel_size: int, stride: int, dilation: int, device: torch.device
) -> Tensor:
    """Row and column of every window member in the map, reflected where it lies outside: (2, K², Ho, Wo), float32."""
    rows = torch.arange(height, dtype=torch.float32, device=device)[:, None].expand(height, width)
    columns = torch.arange(width, dtype=torch.float32, device=device).expand(height, width)
    return torch.stack(list(_window(torch.stack([rows, columns]), kernel_size, stride, dilation)), 1)


def local_attention_probabilities(
    q: Tensor, k: Tensor, position_weight: Tensor, kernel_size: int, stride: int, dilation: int
) -> Tensor:
    """The softmax of `local_attention` over the K² members of every window, (B, N, K², Ho, Wo), float32 or better.

    Reflection needs a map larger than the window's reach, dilation * (K // 2): on a smaller one K is the largest odd
    number for which it is.
    Products are taken in the dtype of q and k and summed in float32 (float64 for float64); positions and the softmax
    are in float32 or better. The members of a window are visited one by one: logits are kept, copies of k are not.
    """
    head_dim = position_weight.shape[0]
    kernel_size = _fitting(kernel_size, dilation, q)
    q, k = (maps.unflatten(1, (-1, head_dim)) for maps in (q, k))  # (B, N, d, H, W)
    wide = torch.promote_types(q.dtype, torch.float32)
    p = positions(q.shape[-2], q.shape[-1], like=q)
    query = q[..., ::stride, ::stride] * head_dim**-0.5  # (B, N, d, Ho, Wo)
    query_position = p[:, ::stride, ::stride]
    # q_i · P (p_i - p_j) = (Pᵀ q_i) · (p_i - p_j): a 2-vector per query and head
    slope = torch.einsum("bndyx,dp->bnpyx", query.to(wide), position_weight.to(wide))

    logits = []
    steps = zip(_window(k, kernel_size, stride, dilation), _window(p, kernel_size, stride, dilation), strict=True)
    for key, key_position in steps:
        content = (query * key).sum(2, dtype=wide)
        logits.append(content + (slope * (query_position - key_position)).sum(2))
    return torch.stack(logits, 2).softmax(2)


def local_attention(
    q: Tensor, k: Tensor, v: Tensor, position_weight: Tensor, kernel_size: int, stride: int, dilation: int
) -> Tensor:
    """Sliding-window attention with reflection padding and linear relative positions; see the public operation.

    The weighted sum is taken in float32 (float64 for float64) over the members one by one, as in
    `local_attention_probabilities`.
    """
    kernel_size = _fitting(kernel_size, dilation, q)
    attention = local_attention_probabilities(q, k, position_weight, kernel_size, stride, dilation).to(v.dtype)
    v = v.unflatten(1, (-1, position_weight.shape[0]))  # (B, N, d, H, W)
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros((), dtype=wide, device=q.device)
    for weight, value in zip(attention.unbind(2), _window(v, kernel_size, stride, dilation), strict=True):
        out = out + weight.unsqueeze(2) * value
    return out.to(v.dtype).flatten(1, 2)


def shift_mask(height: int, width: int, window_size: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """-100 between pixels of a window that a roll by `shift` brought together from different regions, else 0.

    Shape (windows of an H x W map, 1, area, area).
    """
    regions = torch.zeros(1, 1, height, width)
    for dim, (size, window, step) in enumerate(zip((height, width), window_size, shift, strict=True), start=2):
        index = torch.arange(size).view([-1 if d == dim else 1 for d in range(4)])
        regions = regions * 3 + (index >= size - window).float() + (index >= size - step).float()
    cells = F.unfold(regions, window_size, stride=window_size)[0].t()  # (windows, area)
    return torch.where(cells[:, None] == cells[:, :, None], 0.0, -100.0)[:, None]


def _tiles(maps: Tensor, heads: int, window_size: tuple[int, int]) -> Tensor:
    """(B, N * d, H, W) to (B, N, d, area, windows)."""
    return F.unfold(maps, window_size, stride=window_size).unflatten(1, (heads, -1, window_size[0] * window_size[1]))


def window_attention_probabilities(q: Tensor, k: Tensor, bias: Tensor, window_size: tuple[int, int]) -> Tensor:
    """softmax(q kᵀ / sqrt(d) + bias) in every window: (B, windows, N, area, area).

    Bias: (windows or 1, N, area, area).
    """
    heads = bias.shape[1]
    queries = _tiles(q, heads, window_size) * (q.shape[1] // heads) ** -0.5
    return (torch.einsum("bndiw,bndjw->bwnij", queries, _tiles(k, heads, window_size)) + bias).softmax(-1)


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, rows: int, columns: int, shift_rows: int, shift_columns: int
) -> Tensor:
    """Attention within windows, which `unfold` cuts out; see the public operation. Bias: (N, area, area)."""
    size, height, width = (rows, columns), q.shape[-2], q.shape[-1]
    mask = shift_mask(height, width, size, (shift_rows, shift_columns)).to(bias)
    attention = window_attention_probabilities(q, k, bias + mask, size).to(v.dtype)
    out = torch.einsum("bwnij,bndjw->bndiw", attention, _tiles(v, len(bias), size))
    return F.fold(out.flatten(1, 3), (height, width), size, stride=size)


def shift_conv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fc_weight: Tensor,
    shift_weight: Tensor,
    fc_bias: Tensor | None,
    bias: Tensor | None,
    stride: int,
    dilation: int,
) -> Tensor:
    """Fully connected layer over the map index, then a grouped convolution that shifts and sums."""
    kernel = shift_weight.shape[-1]
    maps = torch.cat([q, k, v], 1).unflatten(1, (fc_weight.shape[1], -1))  # (B, 3N, d, H, W)
    mixed = torch.einsum("bmdyx,im->bdiyx", maps, fc_weight)
    if fc_bias is not None:
        mixed = mixed + fc_bias[:, None, None]
    padding = dilation * (kernel // 2)
    return F.conv2d(mixed.flatten(1, 2), shift_weight, bias, stride, padding, dilation, groups=maps.shape[2])
