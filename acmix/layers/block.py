"""The ACmix block: one set of projections, two paths, one mix."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from acmix.layers.attention import AttentionPath, LocalAttention
from acmix.layers.convolution import ShiftConv
from acmix.layers.mix import PathMix
from acmix.layers.path import Path
from acmix.layers.plain import is_observed, is_plain
from acmix.ops import local_mix, local_mix_refusal
from acmix.ops.local_attention.implementations import LOCAL_ATTENTION
from acmix.ops.maps import check_pixels, is_channels_last

WIDE = 64  # input channels from which a matrix product is as fast a projection as a 1×1 convolution; measured on a CPU


class ACmix(nn.Module):
    """Self-attention and convolution over one set of 1×1 projections (paper section 4).

    Args:
        in_channels: Channels of the input map.
        out_channels: Channels of the output map, N * d.
        heads: N.
        kernel_att: Window of the local attention, odd; on a map smaller than it the window shrinks to what fits.
        kernel_conv: Kernel of the convolution path, odd.
        stride: Of both paths.
        dilation: Of both paths.
        mix: Mode of `PathMix`, or a mapping of its mode, alpha, beta, per and tied. A path that the mode leaves out is
            not built.
        shift: Kind of `ShiftConv`.
        attention: The attention path; None builds `LocalAttention` from the arguments above. The block projects what
            the path asks for (`AttentionPath.maps`), also where the mix then leaves the path out.
        conv_bias: Whether the convolution path's fully connected layer has a bias (Swin has one).
        impl: Implementation of local attention; `reference` and `cpp` hold for the convolution path too, which
            otherwise chooses for itself.
        stage: 1-based stage of the network, for logs.
        device, dtype: Of the parameters, as for PyTorch's modules.

    Raises:
        ValueError: if heads do not divide out_channels, a kernel is even, or a name is unknown; at the call, for
            an input of another shape, without a pixel or of integers.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        heads: int = 4,
        kernel_att: int = 7,
        kernel_conv: int = 3,
        stride: int = 1,
        dilation: int = 1,
        *,
        mix: str | Mapping[str, Any] = "learned",
        shift: str = "learned",
        attention: AttentionPath | None = None,
        conv_bias: bool = False,
        impl: str = "auto",
        stage: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if heads < 1:
            raise ValueError(f"heads must be at least 1, got {heads}")
        if out_channels % heads:
            raise ValueError(
                f"{out_channels} channels do not divide into {heads} heads: choose a multiple of {heads} channels, "
                f"or a number of heads that divides {out_channels}"
            )
        if stride < 1 or dilation < 1:
            raise ValueError(f"stride and dilation must be at least 1, got stride {stride} and dilation {dilation}")
        impl = LOCAL_ATTENTION.canonical(impl)
        head_dim = out_channels // heads
        self.in_channels, self.out_channels, self.heads, self.stride = in_channels, out_channels, heads, stride
        with nullcontext() if device is None else torch.device(device):
            self.mix = PathMix.build(mix, stage, heads, out_channels)
            maps = (heads, heads, heads) if attention is None else attention.maps
            shared_maps = sum(maps) if attention is None else attention.shared_maps
            if not self.mix.has_attention and shared_maps < sum(maps):
                maps = shared_maps, 0, 0
            self.widths = of_q, of_k, of_v = [head_dim * count for count in maps]
            """Channels of q, k and v."""
            self.reduces = attention is not None and attention.reduces and self.mix.has_attention
            if self.reduces:
                self.q, self.kv = nn.Linear(in_channels, of_q), nn.Linear(in_channels, of_k + of_v)
            else:
                self.qkv = nn.Linear(in_channels, sum(self.widths))  # rows: q, k, v, each (head, head_dim)
            self.attention: AttentionPath | None = None
            self.convolution: ShiftConv | None = None
            if self.mix.has_attention:
                self.attention = attention or LocalAttention(heads, head_dim, kernel_att, stride, dilation, impl=impl)
            if self.mix.has_convolution:
                conv_impl = impl if impl in ("reference", "cpp") else "auto"
                self.convolution = ShiftConv(
                    heads, head_dim, kernel_conv, stride, dilation,
                    in_maps=shared_maps, kind=shift, bias=conv_bias, impl=conv_impl,
                )  # fmt: skip
        if dtype is not None:
            self.to(dtype)

    def forward(self, x: Tensor, tokens: Tensor | None = None) -> Any:
        """Map (B, in_channels, H, W) to (B, out_channels, ceil(H / stride), ceil(W / stride)), any memory format.

        With tokens (B, T, in_channels), vectors without a place in the map such as a class token, the result is a pair:
        the map and the tokens (B, T, out_channels). A path that `takes_tokens` attends to them and from them as to and
        from any pixel; they go past the convolution path and get alpha · attention.

        Where the mix or a path has hooks, is wrapped or replaced, the path weights are no scalars, or torch.fx traces,
        all three are called as modules, each with its own map. Otherwise the paths are computed straight into their
        weighted sum: the same up to rounding.
        """
        traced = isinstance(x, Proxy)
        if not traced:
            self._check(x)
        height, width = x.shape[-2:]
        qkv, (q, k, v) = self._maps(x)
        takes_tokens = getattr(self.attention, "takes_tokens", False)
        # torch.fx puts a stand-in for every argument of the module that it traces, also where None is meant
        if tokens is not None and (takes_tokens or not isinstance(tokens, Proxy)):
            return self._with_tokens(q, k, v, tokens)
        if traced or not self._can_fuse():
            attention = None if self.attention is None else self._crop(_call(self.attention, q, k, v), height, width)
            convolution = None
            if self.convolution is not None:
                convolution = _call(self.convolution, *self._share(q, k, v, height, width))
            return self.mix(attention, convolution)
        alpha, beta = self.mix.weights()
        if qkv is not None and (out := self._in_one_pass(qkv, alpha, beta, is_channels_last(x))) is not None:
            return out
        if self.convolution is None:
            assert self.attention is not None
            return self._crop(self.attention(q, k, v, scale=alpha), height, width)
        # The weights go into the small matrices at the end of each path, and the second path adds to the first: the
        # maps are never read again just to be scaled and summed.
        convolved = self.convolution(*self._share(q, k, v, height, width), scale=beta)
        if self.attention is None:
            return convolved
        return self.attention(q, k, v, scale=alpha, add_to=convolved)

    def _with_tokens(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` with tokens: the attention path sees them and the pixels as one row, (B, widths, 1, T + H · W)."""
        if self.attention is None or not getattr(self.attention, "takes_tokens", False):
            path = "a convolution path alone" if self.attention is None else type(self.attention).__name__
            raise ValueError(f"{path} takes no tokens beside the map: it needs a global attention, as ReducedAttention")
        height, width = q.shape[-2:]
        count = tokens.shape[1]
        of_q, of_k, of_v = self.qkv(tokens).split(self.widths, 2)
        attended = _call(self.attention, _row(of_q, q), _row(of_k, k), _row(of_v, v))
        convolution = None
        if self.convolution is not None:
            convolution = _call(self.convolution, *self._share(q, k, v, height, width))
        alpha, _ = self.mix.weights()
        mixed = self.mix(attended[:, :, 0, count:].unflatten(2, (height, width)), convolution)
        return mixed, (alpha * attended[..., :count])[:, :, 0].mT

    def _share(self, q: Tensor, k: Tensor, v: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v for the convolution path."""
        share = getattr(self.attention, "share", None)  # a wrapper around the path may lack it
        return (q, k, v) if share is None else share(q, k, v, height, width)

    def _in_one_pass(
        self, qkv: Tensor, alpha: Tensor | float, beta: Tensor | float, channels_last: bool
    ) -> Tensor | None:
        """Both paths by one operation, or None where there is none for them."""
        attention, convolution = self.attention, self.convolution
        if type(attention) is not LocalAttention or type(convolution) is not ShiftConv:
            return None
        window = attention.window
        side_by_side = qkv.permute(0, 2, 3, 1)
        if local_mix_refusal(side_by_side, self.heads, window, convolution.window, attention.impl, convolution.impl):
            return None
        if (weight := convolution.folded_weight(beta)) is None:
            return None
        alpha = torch.as_tensor(alpha, dtype=weight.dtype, device=weight.device)
        return local_mix(
            side_by_side, attention.position_weight, weight, alpha,
            window.kernel_size, window.stride, window.dilation, channels_last=channels_last,
        )  # fmt: skip

    def _check(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"ACmix wants maps (B, in_channels, H, W) with in_channels = {self.in_channels}, got {tuple(x.shape)}: "
                f"give one image a batch dimension by x[None], make tokens (B, H * W, C) a map by "
                f"x.mT.unflatten(2, (H, W)), move channels from the end by x.permute(0, 3, 1, 2)"
            )
        if not x.is_floating_point():
            raise ValueError(f"ACmix wants floating-point maps, got {x.dtype}: convert them, such as by x.float()")
        check_pixels(*x.shape[2:])

    def _can_fuse(self) -> bool:
        paths = (path for path in (self.attention, self.convolution) if path is not None)
        return (
            is_plain(self.mix, PathMix)
            and self.mix.is_scalar
            and all(isinstance(p, Path) and not is_observed(p) for p in paths)
        )

    def _crop(self, out: Tensor, height: int, width: int) -> Tensor:
        """The part of a path's output that belongs to an input of this size, which may have been padded."""
        return out[..., : -(-height // self.stride), : -(-width // self.stride)]

    def _maps(self, x: Tensor) -> tuple[Tensor | None, Sequence[Tensor]]:
        """q, k and v as the attention path wants them, and the one tensor that holds all three if there is one."""
        pad = getattr(self.attention, "pad", None)  # a wrapper around the path may lack it
        x = x if pad is None else pad(x)
        if not self.reduces:
            qkv = self._project(self.qkv, x)
            return qkv, qkv.split(self.widths, 1)
        assert self.attention is not None
        k, v = self._project(self.kv, self.attention.reduce(x)).split(self.widths[1:], 1)
        return None, (self._project(self.q, x), k, v)

    def _project(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """A linear layer over the channels of a map; on a CPU channels_last whatever x is."""
        if not isinstance(x, Proxy) and self._as_convolution(x) and is_plain(layer, nn.Linear):
            return F.conv2d(x, layer.weight[:, :, None, None], layer.bias)
        return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def _as_convolution(self, x: Tensor) -> bool:
        """Whether a 1×1 convolution is a faster projection than a matrix product.

        Never in a compiled graph for a CPU, for the reason in `acmix/ops/opaque.py`.
        """
        channels_last = is_channels_last(x)
        if x.device.type != "cpu":
            return not channels_last
        return channels_last and self.in_channels < WIDE and not torch.compiler.is_compiling()


def _row(tokens: Tensor, maps: Tensor) -> Tensor:
    """Tokens (B, T, C) and the pixels of a map (B, C, H, W) as a map of one row: (B, C, 1, T + H · W)."""
    return torch.cat((tokens, maps.flatten(2).mT), 1).mT[:, :, None]


def _call(path: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A path's map of q, k and v; one node in a graph of torch.fx, whatever the path asks of its inputs."""
    if not isinstance(q, Proxy):
        return path(q, k, v)
    tracer = q.tracer

    def as_node(*maps: Proxy) -> Proxy:
        return tracer.create_proxy("call_module", tracer.path_of_module(path), maps, {})

    return tracer.call_module(path, as_node, (q, k, v), {})
