"""The global attention with spatial reduction of PVT."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmix.layers.attention.base import AttentionPath
from acmix.layers.attention.probabilities import AttentionProbabilities
from acmix.layers.fixed_size import with_fixed_size
from acmix.layers.path import ParityCase
from acmix.ops.derivatives import plain_gradients

SHARED = ("qkv", "q")


class ReducedAttention(AttentionPath):
    """PVT's attention: every pixel attends to all pixels of a smaller map (Pyramid Vision Transformer, section 3.3).

    k and v are projected from the block's input after a convolution whose kernel is its stride, and a layer norm; q is
    not reduced. Nothing but these kernels depends on a size, so maps of every size are taken.

    What the convolution path gets of the projections, `shared`, is a choice that the paper leaves open:
        `qkv`: q at full resolution, and the reduced k and v with every pixel repeated over those it stands for, 3N
            maps. The default: all projections serve both paths, which is the idea of ACmix, and 2N more maps in a
            layer over the map index cost less than 1 % more multiply-adds in a whole network.
        `q`: q alone, N maps: the cheapest.
    Projecting k and v again at full resolution would exceed the paper's budget by a tenth.

    Args:
        heads: N.
        head_dim: d.
        reduction: Kernel and stride of the reducing convolution; 1 is none, and plain global attention.
        shared: What the convolution path gets, `qkv` or `q`.
        project: Whether a linear layer `proj` follows, as in PVT.
        impl: `auto` (PyTorch's fused attention, which never holds the table of all pairs) or `reference`.

    Raises:
        ValueError: for an unknown impl or `shared`, or a reduction below 1.
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        reduction: int = 1,
        *,
        shared: str = "qkv",
        project: bool = True,
        impl: str = "auto",
    ) -> None:
        if impl not in ("auto", "reference"):
            raise ValueError(f"unknown impl {impl!r}: reduced attention has auto and reference")
        if shared not in SHARED:
            raise ValueError(f"shared {shared!r} is unknown: choose qkv or q")
        if reduction < 1:
            raise ValueError(f"reduction must be at least 1, got {reduction}")
        super().__init__(heads, head_dim, project=project, impl=impl)
        self.reduction, self.shares_kv = reduction, shared == "qkv"
        channels = heads * head_dim
        self.reducing = nn.Conv2d(channels, channels, reduction, reduction) if reduction > 1 else None
        self.norm = nn.LayerNorm(channels) if reduction > 1 else None

    def reduce(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H // reduction, W // reduction), where a shorter side is filled up with zeros."""
        if self.reducing is None or self.norm is None:
            return x
        x = self.reducing(filled_to(with_fixed_size(x), self.reduction))
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    @property
    def takes_tokens(self) -> bool:
        return not self.reduces

    @property
    def reduces(self) -> bool:
        return self.reduction > 1

    @property
    def shared_maps(self) -> int:
        return self.heads * (3 if self.shares_kv else 1)

    def share(self, q: Tensor, k: Tensor, v: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, and k and v at its size, or two maps without channels; see `shared`."""
        if not self.shares_kv:
            return q, q[:, :0], q[:, :0]
        if self.reduces:
            k, v = (F.interpolate(m, size=(height, width)) for m in (k, v))
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, N * d, H, W), k and v (B, N * d, h, w) to (B, N * d, H, W), a channels_last view."""
        height, width = q.shape[-2:]
        q, k, v = (m.flatten(2).unflatten(1, (self.heads, self.head_dim)).mT for m in (q, k, v))  # (B, N, pixels, d)
        out = scaled_dot_product(q, k, v)
        return out.transpose(1, 2).flatten(2).unflatten(1, (height, width)).permute(0, 3, 1, 2)

    def reference(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q kᵀ / sqrt(d)) v over all pixels."""
        height, width = q.shape[-2:]
        v = v.flatten(2).unflatten(1, (self.heads, self.head_dim))
        out = torch.einsum("bnij,bndj->bndi", self._softmax(q, k).to(v.dtype), v)
        return out.flatten(1, 2).unflatten(2, (height, width))

    def attention_probabilities(self, q: Tensor, k: Tensor) -> AttentionProbabilities | None:
        """The softmax over the pixels of the reduced map, each placed in the middle of those that it stands for.

        None where tokens stand in a row with the pixels, which then have no place.
        """
        if self.takes_tokens and q.shape[-2] == 1 < q.shape[-1]:
            return None
        sides = q.shape[-2:]
        queries, members = (
            torch.cartesian_prod(
                *(_centres(side, count, q.device) for side, count in zip(sides, m.shape[-2:], strict=True))
            )
            for m in (q, k)
        )
        keys = members.expand(len(queries), *members.shape)
        return AttentionProbabilities(self._softmax(q, k), queries, keys, keys.new_ones(keys.shape[:2]).bool())

    def _softmax(self, q: Tensor, k: Tensor) -> Tensor:
        """(B, N, pixels of q, pixels of k), in float32 or better."""
        q, k = (m.flatten(2).unflatten(1, (self.heads, self.head_dim)) for m in (q, k))  # (B, N, d, pixels)
        logits = torch.einsum("bndi,bndj->bnij", q * self.head_dim**-0.5, k)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)

    def multiply_adds(self, shape: Sequence[int]) -> int:
        """Every pixel attends to every pixel of the reduced map, and is projected.

        The reducing convolution is no part of this: it makes what k and v are projected from.
        """
        pixels = math.prod(max(1, side // self.reduction) for side in shape[2:])
        return 2 * pixels * math.prod(shape) + self.projection_multiply_adds(shape)

    @classmethod
    def parity_cases(cls) -> Iterator[ParityCase]:
        yield {"heads": 3, "head_dim": 4}, (5, 7)
        yield {"heads": 1, "head_dim": 8, "project": False}, (9, 4)
        yield {"heads": 2, "head_dim": 5}, (1, 2)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, head_dim={self.head_dim}, reduction={self.reduction}"


def _centres(side: int, count: int, device: torch.device) -> Tensor:
    """The middles of `count` equal parts of a side of so many pixels, whose own middles are whole numbers."""
    return (torch.arange(count, device=device) + 0.5) * (side / count) - 0.5


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's fused attention; outside compiled and exported graphs its gradient can be differentiated again."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v)
    return _TwiceDifferentiable.apply(q, k, v)


class _TwiceDifferentiable(torch.autograd.Function):
    """The fused kernels have no second derivative: a backward pass that is recorded is taken through plain PyTorch."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.fused = _with_graph(inputs)
        out: Tensor = ctx.fused[0]
        return out.detach()

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled():
            return plain_gradients("scaled_dot_product", _plain, ctx.saved_tensors, (), grad_out)
        out, leaves = ctx.fused or _with_graph(ctx.saved_tensors)
        ctx.fused = None  # what it keeps is free as soon as it has been used
        return torch.autograd.grad(out, leaves, grad_out)


def _with_graph(inputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The attention, recorded from leaves of its own, and these leaves."""
    with torch.enable_grad():
        q, k, v = leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        return F.scaled_dot_product_attention(q, k, v), leaves


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1) @ v


@torch.fx.wrap
def filled_to(x: Tensor, size: int) -> Tensor:
    """The map (B, C, H, W) with zeros below and to the right, where a side is shorter than `size`."""
    height, width = x.shape[-2:]
    return x if height >= size and width >= size else F.pad(x, (0, max(0, size - width), 0, max(0, size - height)))
