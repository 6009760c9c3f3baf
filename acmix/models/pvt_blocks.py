"""The blocks and stages of ACmix-PVT, which `acmix_pvt.py` puts together."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from timm.models._features_fx import register_notrace_module
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from acmix.layers import ACmix, ReducedAttention
from acmix.layers.attention.reduced import filled_to
from acmix.layers.fixed_size import with_fixed_size
from acmix.models.checks import perceptron_width

EPS = 1e-6  # of the layer norms that are PVT's argument; those of patches and reduction have PyTorch's 1e-5

torch.fx.wrap("filled_to")  # in this module too, not only where it is defined


class PVTBlock(nn.Module):
    """Normalisation, ACmix over the map, and a multi-layer perceptron, each with a shortcut.

    Args:
        dim: Channels.
        heads: Heads of the ACmix block.
        reduction: By how much the map is reduced for k and v.
        mlp_ratio: Hidden width of the perceptron over dim.
        proj_drop: Dropout after the block and in the perceptron.
        drop_path: Probability of leaving a branch out, per image, in training.
        conv_shares: What the convolution path gets: `shared` of `ReducedAttention`.
        tokens: How many tokens go before the pixels.
        impl: `reference` for both paths, or the implementation of the convolution path.
        acmix: Further arguments of the ACmix block.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        reduction: int,
        mlp_ratio: float = 4.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        conv_shares: str = "qkv",
        tokens: int = 0,
        impl: str = "auto",
        **acmix: Any,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"{dim} channels do not divide into {heads} heads: choose embed_dims and heads that fit")
        self.tokens = tokens
        self.norm1 = nn.LayerNorm(dim, EPS)
        attention_impl = "reference" if impl == "reference" else "auto"
        attention = ReducedAttention(heads, dim // heads, reduction, shared=conv_shares, impl=attention_impl)
        self.acmix = ACmix(dim, dim, heads, attention=attention, impl=impl, **acmix)
        self.proj_drop = nn.Dropout(proj_drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, EPS)
        self.mlp = Mlp(dim, perceptron_width(dim, mlp_ratio), drop=proj_drop)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """(B, tokens + height · width, dim) to the same shape: the tokens, then the pixels of a map, row by row."""
        x = x + self.drop_path(self.proj_drop(self._mixed(self.norm1(x), height, width)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _mixed(self, x: Tensor, height: int, width: int) -> Tensor:
        maps = x[:, self.tokens :].mT.unflatten(2, (height, width))
        if not self.tokens:
            return self.acmix(maps).flatten(2).mT
        maps, tokens = self.acmix(maps, x[:, : self.tokens])
        return torch.cat((tokens, maps.flatten(2).mT), 1)


@register_notrace_module
class PVTStage(nn.Module):
    """Patches with their position, and a row of blocks.

    Args:
        in_dim, dim: Channels before and after.
        patch_size: Side of the patches, in pixels of the map before.
        size: (H, W) of the map, in patches, that the positions are made for.
        class_token: Whether a learned token joins the map.
        blocks: The arguments of each block.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        patch_size: int,
        size: tuple[int, int],
        class_token: bool,
        blocks: Sequence[dict[str, Any]],
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.patch_size, self.size = patch_size, size
        self.proj = nn.Conv2d(in_dim, dim, patch_size, patch_size)
        self.norm = nn.LayerNorm(dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, dim, *size))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        self.cls_pos_embed = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        self.pos_drop = nn.Dropout(blocks[0]["proj_drop"])
        self.blocks = nn.ModuleList(PVTBlock(dim, tokens=int(class_token), **block) for block in blocks)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Map (B, in_dim, H, W) to a map (B, dim, h, w) and the class token (B, 1, dim), if there is one.

        Rows and columns beyond the last whole patch are left out; a side shorter than a patch is filled up with zeros.
        """
        x = self.proj(filled_to(with_fixed_size(x), self.patch_size))
        height, width = x.shape[-2:]
        position = resize_position(self.pos_embed, (height, width))
        x = self.norm(x.flatten(2).mT) + position.flatten(2).mT
        if self.cls_token is not None and self.cls_pos_embed is not None:
            x = torch.cat(((self.cls_token + self.cls_pos_embed).expand(x.shape[0], -1, -1), x), 1)
        x = self.pos_drop(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, height, width)
            else:
                x = block(x, height, width)
        if self.cls_token is None:
            return x.mT.unflatten(2, (height, width)), None
        return x[:, 1:].mT.unflatten(2, (height, width)), x[:, :1]


@torch.fx.wrap
def resize_position(position: Tensor, size: tuple[int, int]) -> Tensor:
    """Learned positions (1, C, H, W), interpolated bilinearly for a map of another size, as PVT does."""
    return position if position.shape[-2:] == size else F.interpolate(position, size=size, mode="bilinear")
