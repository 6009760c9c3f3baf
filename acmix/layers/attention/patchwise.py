"""The patchwise self-attention of SAN (Zhao et al., Exploring Self-attention for Image Recognition, CVPR 2020)."""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmix.layers.attention.base import AttentionPath
from acmix.layers.path import ParityCase
from acmix.layers.plain import is_plain
from acmix.ops import patch_aggregation, patch_features
from acmix.ops.maps import without_autocast
from acmix.ops.patchwise.border import reflected, reflection
from acmix.ops.patchwise.implementations import PATCH_AGGREGATION


class PatchwiseAttention(AttentionPath):
    """Attention whose weights a small network computes from the query and all keys of the patch at once.

    q and k are one map of width d, v is N maps. At every pixel the d channels of q and the d · K² of k in the K × K
    patch around it go through batch norm, ReLU, a 1×1 layer to G = N · d / sharing channels, batch norm, ReLU and a 1×1
    layer to G · K² weights. Channel i of v is summed over the patch with the weights of group i mod G. There is no
    softmax and no position.

    The patch is reflected at the border. A map not larger than K // 2 is reflected again and again, and a single pixel
    repeated, so that a map of any size has an answer; the layers, whose shapes follow from K, stay as they are.

    Args:
        heads: N.
        head_dim: d.
        kernel_size: K, odd.
        sharing: Channels of v that share a weight; it divides N · d.
        impl: `auto`, `taps` or `reference`; see `acmix.ops.patch_features`. Where a layer is wrapped, replaced or has
            hooks, the reference runs, which calls all of them.

    Raises:
        ValueError: for an even kernel size, an unknown impl, or a sharing that does not divide the channels.
    """

    conv_norms = (("reduce_patch", "norm2"),)  # for acmix.fuse

    def __init__(
        self, heads: int, head_dim: int, kernel_size: int = 7, sharing: int = 8, *, impl: str = "auto"
    ) -> None:
        super().__init__(heads, head_dim, impl=PATCH_AGGREGATION.canonical(impl))
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_att {kernel_size} has no centre pixel: choose an odd size, such as 7")
        channels = heads * head_dim
        if sharing < 1 or channels % sharing:
            raise ValueError(f"sharing {sharing} does not divide {channels} channels: choose a divisor of them")
        self.kernel_size, self.sharing = kernel_size, sharing
        groups, patch = channels // sharing, head_dim * (kernel_size**2 + 1)
        self.norm1 = nn.BatchNorm2d(patch)  # channels: q, then k as (channel, tap)
        self.reduce_patch = nn.Conv2d(patch, groups, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(groups)
        self.expand = nn.Conv2d(groups, groups * kernel_size**2, 1)  # rows: (group, tap)

    @property
    def maps(self) -> tuple[int, int, int]:
        return 1, 1, self.heads

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layers = (self.norm1, nn.BatchNorm2d), (self.reduce_patch, nn.Conv2d), (self.expand, nn.Conv2d)
        if not all(is_plain(layer, kind) for layer, kind in layers):
            return self.reference(q, k, v)
        with without_autocast(q):
            hidden = self.norm2(self._features(q, k)).relu()
            weight = self.expand.weight.flatten(1).unflatten(0, (-1, self.kernel_size**2))
            bias = self.expand.bias if self.expand.bias is not None else weight.new_zeros(len(self.expand.weight))
            return patch_aggregation(v, hidden, weight, bias.view(weight.shape[:2]), self.kernel_size, self.impl)

    def reference(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The layers one after the other, over the patches of k and v cut out by `unfold`."""
        members, reach = self.kernel_size**2, self.kernel_size // 2
        patches = F.unfold(reflected(k, reach), self.kernel_size)  # (B, d * K², H * W), channels (channel, tap)
        together = torch.cat([q.flatten(2), patches], 1)[:, :, None]
        hidden = self.norm2(self.reduce_patch(self.norm1(together).relu())).relu()
        weights = self.expand(hidden).flatten(2).unflatten(1, (-1, members))  # (B, G, K², H * W)
        values = F.unfold(reflected(v, reach), self.kernel_size).unflatten(1, (self.sharing, -1, members))
        return (values * weights[:, None]).sum(3).to(v.dtype).flatten(1, 2).unflatten(2, v.shape[2:])

    def multiply_adds(self, shape: Sequence[int]) -> int:
        """Both layers that make the weights, and K² products for each value."""
        members, groups = self.kernel_size**2, self.heads * self.head_dim // self.sharing
        pixels = math.prod(shape) // shape[1]
        return pixels * (self.head_dim * (members + 1) * groups + groups * groups * members + shape[1] * members)

    @classmethod
    def parity_cases(cls) -> Iterator[ParityCase]:
        yield {"heads": 4, "head_dim": 2, "kernel_size": 3}, (7, 5)
        yield {"heads": 4, "head_dim": 4, "kernel_size": 7, "sharing": 4}, (9, 8)
        yield {"heads": 2, "head_dim": 3, "kernel_size": 5, "sharing": 2}, (2, 4)

    def _features(self, q: Tensor, k: Tensor) -> Tensor:
        """The first norm, ReLU and the first layer, without the patches: (B, G, H, W)."""
        scale, offset = self._first_norm(q, k)
        weight, width = self.reduce_patch.weight.flatten(1), self.head_dim
        features = []
        for maps, size, channels in ((q, 1, slice(width)), (k, self.kernel_size, slice(width, None))):
            a, b, w = (each[..., channels].unflatten(-1, (width, size**2)) for each in (scale, offset, weight))
            features.append(patch_features(maps, a, b, w, size, self.impl))
        out = features[0] + features[1]
        return out if self.reduce_patch.bias is None else out + self.reduce_patch.bias.to(out.dtype)[:, None, None]

    def _first_norm(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """The first norm as a factor and a summand for each of its channels, in float32 or better."""
        norm, wide = self.norm1, torch.promote_types(q.dtype, torch.float32)
        if norm.training or norm.running_mean is None or norm.running_var is None:
            of_q, of_k = patch_moments(q.to(wide), 1), patch_moments(k.to(wide), self.kernel_size)
            mean, variance = (torch.cat(both) for both in zip(of_q, of_k, strict=True))
            if norm.training and norm.track_running_stats and q.shape[0]:
                self._track(mean, variance, q.shape[0] * q.shape[2] * q.shape[3])
        else:
            mean, variance = norm.running_mean.to(wide), norm.running_var.to(wide)
        scale = (variance + norm.eps).rsqrt()
        if norm.affine:
            scale = scale * norm.weight
        return scale, -mean * scale + (norm.bias if norm.affine else 0.0)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, values: int) -> None:
        """Update the first norm's running statistics as `nn.BatchNorm2d` does."""
        norm = self.norm1
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.add_(1)
        momentum = 1 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
        unbiased = variance * (values / max(values - 1, 1))
        for running, new in ((norm.running_mean, mean), (norm.running_var, unbiased)):
            running.add_(momentum * (new.to(running.dtype) - running))

    def extra_repr(self) -> str:
        return (
            f"heads={self.heads}, head_dim={self.head_dim}, kernel_size={self.kernel_size}, sharing={self.sharing}, "
            f"impl={self.impl}"
        )


def patch_moments(maps: Tensor, kernel_size: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel at every place of the patch, channels (channel, tap): (C * K²,) each.

    Each place sees the map shifted and reflected: how often it sees a pixel is a matrix for the rows and one for the
    columns. So the moments follow from the map's own sum over the batch, and the patches are never made.
    """
    batch, channels, height, width = maps.shape
    if batch == 0:  # and no numbers to take a mean of
        return maps.new_zeros(channels * kernel_size**2), maps.new_ones(channels * kernel_size**2)
    centre = maps.detach().mean((0, 2, 3))  # it cancels, and with it the rounding of large means
    maps = maps - centre[:, None, None]
    rows, columns = (_visits(size, kernel_size, maps) for size in (height, width))
    mean, square = (
        (rows @ total @ columns.T).flatten() / (batch * height * width) for total in (maps.sum(0), maps.square().sum(0))
    )
    return centre.repeat_interleave(kernel_size**2) + mean, (square - mean.square()).clamp(min=0)


def _visits(size: int, kernel_size: int, like: Tensor) -> Tensor:
    """How often each tap of a patch (rows) meets each of `size` pixels (columns), along one axis."""
    pixel = reflection(size, kernel_size // 2, like.device).unfold(0, size, 1)  # (K, size): of each tap and query
    return (pixel[..., None] == torch.arange(size, device=like.device)).sum(1).to(like.dtype)
