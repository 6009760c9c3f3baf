"""ACmix blocks as few standard operators, with everything folded that inference keeps constant.

In both forms the softmax's scale goes into the projection's rows for q, beta into the convolution path and alpha into
what the attention multiplies last. What another reader of q, k or v is not to see, its weights divide by.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmix.export.windows import WindowedAttention, parts, position_term
from acmix.layers import ACmix, LocalAttention, ShiftConv, WindowAttention
from acmix.layers.inference import constant, exact, mix_constants, norm_constants, rows_of

Size = tuple[int, int]

_SMALLEST_FACTOR = 1e-6  # of the rows of v: dividing by less could overflow, and zeros cannot be divided by


class FoldedLocalBlock(nn.Module):
    """A block with local attention and a convolution path that is one weight, or with either alone.

    alpha and a batch norm after the block go into the rows of v and into the convolution.

    Args:
        block: The block; it is not changed.
        size: (H, W) of its input; None for any size.
        norm: What alone reads its output, if that is a batch norm.
    """

    def __init__(self, block: ACmix, size: Size | None, norm: nn.BatchNorm2d | None = None) -> None:
        super().__init__()
        channels, like = block.out_channels, block.qkv.weight
        self.heads, self.head_dim = block.heads, channels // block.heads
        alpha, beta = mix_constants(block.mix)
        gain, shift = (alpha.new_ones(channels), alpha.new_zeros(channels)) if norm is None else norm_constants(norm)
        factor = alpha.new_ones(3, channels)  # of the rows of q, k and v
        self.gain: nn.Parameter | None = None
        if isinstance(block.attention, LocalAttention):
            factor[0] = self.head_dim**-0.5
            if (alpha * gain).abs().min() > _SMALLEST_FACTOR:
                factor[2] = alpha * gain
            else:
                self.gain = constant((alpha * gain)[:, None, None], like)
        bias = exact(block.qkv.bias) * factor.flatten()
        self._set_attention(block.attention, size, like)
        self.convolution: _GroupedConv | None = None
        if block.convolution is not None:
            folded = block.convolution.folded_weight(1.0)
            assert folded is not None
            weight = exact(folded) * rows_of(beta * gain, folded)
            # rows (head_dim, head), columns the 3N maps of that place in a head
            weight = weight.unflatten(0, (self.head_dim, -1)) / factor.view(-1, self.head_dim).T[:, None, :, None, None]
            self.convolution = _GroupedConv(block.convolution, weight.flatten(0, 1), shift, like)
        else:
            bias[2 * channels :] += shift  # attention passes a constant of v on, because its weights sum to 1
        self.weight = constant((exact(like) * factor.flatten()[:, None])[:, :, None, None], like)
        self.bias = constant(bias, like)

    def _set_attention(self, attention: nn.Module | None, size: Size | None, like: Tensor) -> None:
        self.attention: WindowedAttention | None = None
        self.offset: nn.Parameter | None = None
        if isinstance(attention, LocalAttention):
            self.attention = WindowedAttention(attention.window, size)
            self.position_weight = constant(exact(attention.position_weight), like)
            if size is not None:
                self.offset = constant(position_term(exact(attention.position_weight), *size), like)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, ceil(H / stride), ceil(W / stride))."""
        height, width = x.shape[2:]
        qkv = F.conv2d(x, self.weight, self.bias)
        convolved = None
        if self.convolution is not None:
            maps = qkv.unflatten(1, (-1, self.head_dim)).transpose(1, 2)  # (B, d, 3N, H, W)
            convolved = self.convolution(maps.flatten(1, 2))
        if self.attention is None:
            assert convolved is not None
            return convolved
        q, k, v = qkv.unflatten(1, (-1, self.head_dim)).flatten(3).mT.chunk(3, 1)  # (B, N, H * W, d)
        offset = position_term(self.position_weight, height, width) if self.offset is None else self.offset
        out = self.attention(q, k - offset, v, height, width)
        size = [parts(side, self.attention.window.stride) for side in (height, width)]
        out = out.mT.unflatten(3, size).flatten(1, 2)
        if self.gain is not None:
            out = self.gain * out
        return out if convolved is None else out + convolved


class FoldedWindowBlock(nn.Module):
    """A block with window attention whose convolution path, if any, mixes maps by a fully connected layer.

    That layer and its bias go into the projection, which gives the k² mixed maps beside q, k and v. Position bias and
    shift mask are one constant.

    Args:
        block: The block; it is not changed.
        size: (H, W) of its input.
    """

    mask: Tensor

    def __init__(self, block: ACmix, size: Size) -> None:
        super().__init__()
        attention, like = block.attention, block.qkv.weight
        assert isinstance(attention, WindowAttention)
        assert attention.proj is not None
        self.heads, self.head_dim = block.heads, attention.head_dim
        self.window, self.size = attention.window_size, size
        alpha, beta = mix_constants(block.mix)
        weight, bias = exact(block.qkv.weight), exact(block.qkv.bias)
        rows = [self._scaled(weight)]
        biases = [self._scaled(bias)]
        self.convolution: _GroupedConv | None = None
        if (convolution := block.convolution) is not None:
            rows.append(self._mixed(convolution, weight))
            fc_bias = None if convolution.fc_bias is None else exact(convolution.fc_bias)
            biases.append(self._mixed(convolution, bias, fc_bias))
            kernels = exact(convolution.shift_weight)
            self.convolution = _GroupedConv(convolution, kernels * rows_of(beta, kernels), None, like)
        self.weight, self.bias = constant(torch.cat(rows), like), constant(torch.cat(biases), like)
        self.proj_weight = constant(alpha[:, None] * exact(attention.proj.weight), like)
        self.proj_bias = constant(alpha * exact(attention.proj.bias), like)
        self.rows_added, self.columns_added = (-side % window for side, window in zip(size, self.window, strict=True))
        padded = size[0] + self.rows_added, size[1] + self.columns_added
        self.register_buffer("mask", attention.bias(*padded).detach().clone(), persistent=False)

    def _scaled(self, rows: Tensor) -> Tensor:
        q, *others = rows.chunk(3)
        return torch.cat([q * self.head_dim**-0.5, *others])

    def _mixed(self, convolution: ShiftConv, rows: Tensor, bias: Tensor | None = None) -> Tensor:
        """The rows of the k² mixed maps, (head_dim, k²), from those of the 3N maps (map, head_dim)."""
        mixed = torch.einsum("im,md...->di...", exact(convolution.fc_weight), rows.unflatten(0, (-1, self.head_dim)))
        return (mixed if bias is None else mixed + bias).flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) of the one size to (B, out_channels, H, W)."""
        (height, width), channels = self.size, self.heads * self.head_dim
        x = x.permute(0, 2, 3, 1)
        if self.rows_added or self.columns_added:
            x = F.pad(x, (0, 0, 0, self.columns_added, 0, self.rows_added))
        projected = F.linear(x, self.weight, self.bias)
        out = self._attend(projected[..., : 3 * channels])
        out = F.linear(out[:, :height, :width], self.proj_weight, self.proj_bias).permute(0, 3, 1, 2)
        if self.convolution is None:
            return out
        return out + self.convolution(projected[:, :height, :width, 3 * channels :].permute(0, 3, 1, 2))

    def _attend(self, qkv: Tensor) -> Tensor:
        """(B, H, W, 3 * N * d) to (B, H, W, N * d), both padded."""
        (rows, columns), (height, width) = self.window, qkv.shape[1:3]
        windows = qkv.view(qkv.shape[0], height // rows, rows, width // columns, columns, 3 * self.heads, self.head_dim)
        # (B, windows, N, pixels of a window, d)
        q, k, v = windows.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5).flatten(1, 2).chunk(3, 2)
        out = ((q @ k.mT) + self.mask).softmax(-1) @ v
        out = out.unflatten(3, (rows, columns)).unflatten(1, (height // rows, width // columns))
        return out.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4).flatten(1, 2)


class _GroupedConv(nn.Module):
    """A convolution path as one convolution in d groups."""

    def __init__(self, path: ShiftConv, weight: Tensor, bias: Tensor | None, like: Tensor) -> None:
        super().__init__()
        self.window, self.groups = path.window, path.head_dim
        self.weight = constant(weight, like)
        self.bias = None if bias is None else constant(bias, like)

    def forward(self, maps: Tensor) -> Tensor:
        window = self.window
        return F.conv2d(maps, self.weight, self.bias, window.stride, window.reach, window.dilation, self.groups)
