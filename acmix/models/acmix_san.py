"""ACmix-SAN: the self-attention network whose patchwise attention is an ACmix block.

Paper: On the Integration of Self-Attention and Convolution, CVPR 2022, https://arxiv.org/abs/2111.14556, table 2; the
network around the block is SAN, https://arxiv.org/abs/2004.13621.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, create_classifier
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from acmix.layers import ACmix, PatchwiseAttention, path_weights, tie_path_weights
from acmix.models.checks import check_positive, check_rates
from acmix.models.drop_path import drop_path_rates
from acmix.models.layout import fast_layout
from acmix.models.placed import placed

STAGES = ("layer1", "layer2", "layer3", "layer4", "layer5")
WIDTHS = (1, 4, 8, 16, 32)  # of the stages, in widths of the stem
HEADS = 4  # v is a quarter of the block's width and q and k a sixteenth: 4 maps for 1 and 1
SHARING = 8  # channels of v that share a weight


class SANBlock(nn.Module):
    """Norm, ReLU, ACmix with patchwise attention to a quarter of the width, norm, ReLU and a 1×1 convolution back, with
    a shortcut around them.

    Args:
        width: Channels of the map.
        kernel_att: Patch of the attention.
        drop_path: Probability of leaving the branch out, per image, in training.
        impl: Implementation of the attention and, where it is `reference`, of the convolution path.
        acmix: Further arguments of the ACmix block.
    """

    def __init__(
        self, width: int, kernel_att: int, drop_path: float = 0.0, *, impl: str = "auto", **acmix: Any
    ) -> None:
        super().__init__()
        inner = width // HEADS
        sharing = math.gcd(SHARING, inner)
        attention = PatchwiseAttention(HEADS, inner // HEADS, kernel_att, sharing, impl=impl)
        conv_impl = "reference" if impl == "reference" else "auto"
        self.norm1 = nn.BatchNorm2d(width)
        self.acmix = ACmix(width, inner, HEADS, attention=attention, impl=conv_impl, **acmix)
        self.norm2 = nn.BatchNorm2d(inner)
        self.conv = nn.Conv2d(inner, width, 1)
        self.act = nn.ReLU(inplace=True)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.acmix(self.act(self.norm1(x)))
        return x + self.drop_path(self.conv(self.act(self.norm2(out))))


class SANStage(nn.Module):
    """Max pooling, a 1×1 convolution to the stage's width, a row of blocks, norm and ReLU.

    Args:
        in_width, width: Channels before and after the convolution.
        kernel_att: Patch of the attention.
        pool: Whether to halve the map; an odd side is rounded up, so that no map vanishes.
        drop_paths: Stochastic depth of each block.
        block: Further arguments of the blocks.
    """

    def __init__(
        self, in_width: int, width: int, kernel_att: int, pool: bool, drop_paths: Sequence[float], **block: Any
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.pool = nn.MaxPool2d(2, 2, ceil_mode=True) if pool else nn.Identity()
        self.conv = nn.Conv2d(in_width, width, 1, bias=False)
        self.blocks = nn.Sequential(*(SANBlock(width, kernel_att, rate, **block) for rate in drop_paths))
        self.norm = nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.pool(x))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return self.act(self.norm(x))


class ACmixSAN(nn.Module):
    """ACmix-SAN for images (B, in_chans, H, W) of any size, patchwise attention.

    The convolution path takes what SAN projects anyway: q and k as one map of a sixteenth of the stage's width each, v
    as four, six maps in all.

    Args:
        layers: Blocks in each of the five stages.
        num_classes: Width of the classifier; 0 leaves it out.
        in_chans: Channels of the images.
        global_pool: timm's name of the pooling before the classifier.
        stem: `imagenet`: every stage halves the map; or `cifar`: the first two do not, for images of about 32×32.
        block: `acmix`, or `plain` for SAN itself, the same as `mix` `attention`.
        base_width: Channels of the stem and of the first stage, a multiple of 16; every other width follows.
        kernel_att: Patch of the attention, one number for each stage.
        kernel_conv: Kernel of the convolution path.
        mix: Mode of `acmix.layers.PathMix`, or a mapping of its arguments, such as {per: head}.
        shift: Kind of `acmix.layers.ShiftConv`.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0. SAN has none.
        impl: Implementation of the attention; see `acmix.layers.PatchwiseAttention`.

    Raises:
        ValueError: for arguments that do not fit together.
    """

    conv_norms = (("conv1", "bn1"),)  # for acmix.fuse

    @placed
    def __init__(
        self,
        layers: Sequence[int] = (2, 1, 2, 4, 1),
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        stem: str = "imagenet",
        block: str = "acmix",
        base_width: int = 64,
        kernel_att: Sequence[int] = (3, 7, 7, 7, 7),
        kernel_conv: int = 3,
        mix: str | dict[str, Any] = "learned",
        shift: str = "learned",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        check_positive(base_width=base_width, in_chans=in_chans)
        check_rates(drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        if stem not in ("imagenet", "cifar"):
            raise ValueError(f"unknown stem {stem!r}: choose imagenet or cifar")
        if block not in ("acmix", "plain"):
            raise ValueError(f"unknown block {block!r}: choose acmix or plain")
        if len(layers) != len(STAGES) or min(layers) < 1 or len(kernel_att) != len(STAGES):
            raise ValueError(
                f"layers and kernel_att need {len(STAGES)} numbers of at least 1, got {list(layers)} and "
                f"{list(kernel_att)}"
            )
        if base_width % 16:
            raise ValueError(
                f"base_width must be a multiple of 16, got {base_width}: the maps of a head are a sixteenth"
            )
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.conv1 = nn.Conv2d(in_chans, base_width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(base_width)
        self.act1 = nn.ReLU(inplace=True)
        self.feature_info: list[dict[str, Any]] = [{"num_chs": base_width, "reduction": 1, "module": "act1"}]
        mix = "attention" if block == "plain" else mix
        shared = {"kernel_conv": kernel_conv, "mix": mix, "shift": shift, "impl": impl}
        width, reduction, drop_paths = base_width, 1, drop_path_rates(drop_path_rate, layers)
        for index, name in enumerate(STAGES):
            in_width, width = width, base_width * WIDTHS[index]
            pool = stem == "imagenet" or index > 1
            reduction *= 2 if pool else 1
            stage = SANStage(in_width, width, kernel_att[index], pool, drop_paths[index], stage=index + 1, **shared)
            self.add_module(name, stage)
            self.feature_info.append({"num_chs": width, "reduction": reduction, "module": name})
        self.num_features: int = width
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        tie_path_weights(self)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the path weights."""
        return set(path_weights(self))

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that order the parameters by depth, for layer-wise learning rates."""
        inside = [(r"^layer(\d+)\.conv", (0,)), (r"^layer(\d+)\.blocks\.(\d+)", None), (r"^layer(\d+)\.norm", (99,))]
        return {"stem": r"^(?:conv1|bn1)\.", "blocks": r"^layer(\d+)" if coarse else inside}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its intermediate maps."""
        for name in STAGES:
            self.get_submodule(name).grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer, or Identity without classes."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier, and another pooling if named, in place of the present one."""
        self.num_classes = num_classes
        like = next(self.parameters())
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=pool_type)
        for part in (self.global_pool, self.fc):
            part.to(like.device, like.dtype).train(self.training)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Maps after the stem and after each stage; timm's arguments, `norm` without effect here."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt {output_fmt!r} is not offered: choose NCHW")
        take, last = feature_take_indices(len(self.feature_info), indices)
        x = self._stem(x)
        intermediates = [x] if 0 in take else []
        for index, name in enumerate(STAGES, start=1):
            if stop_early and index > last:
                break
            x = self.get_submodule(name)(x)
            if index in take:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last index, and the classifier; returns the indices kept."""
        take, last = feature_take_indices(len(self.feature_info), indices)
        for name in STAGES[last:]:
            self.add_module(name, nn.Identity())
        if last < len(STAGES):
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or last < len(STAGES):
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the last stage's map (B, num_features, h, w)."""
        x = self._stem(x)
        for name in STAGES:
            x = self.get_submodule(name)(x)
        return x

    def _stem(self, x: Tensor) -> Tensor:
        return self.act1(self.bn1(self.conv1(fast_layout(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map to logits, or to pooled features (B, head_hidden_size) if `pre_logits`."""
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _create(variant: str, pretrained: bool, **kwargs: Any) -> ACmixSAN:
    feature_cfg = {"out_indices": tuple(range(1 + len(STAGES)))}  # timm's default ends one before the last
    return build_model_with_cfg(ACmixSAN, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


_CFG = {
    "url": "",
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": (7, 7),
    "crop_pct": 0.875,
    "interpolation": "bilinear",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "conv1",
    "classifier": "fc",
    "paper_ids": "arXiv:2111.14556",
    "paper_name": "On the Integration of Self-Attention and Convolution",
}

default_cfgs = generate_default_cfgs(
    {f"{name}.untrained": dict(_CFG) for name in ("acmix_san10", "acmix_san15", "acmix_san19")}
)


@register_model
def acmix_san10(pretrained: bool = False, **kwargs: Any) -> ACmixSAN:
    """ACmix-SAN-10: 12.0 million parameters, 77.6 % top-1 on ImageNet in the paper."""
    return _create("acmix_san10", pretrained, **{"layers": (2, 1, 2, 4, 1), **kwargs})


@register_model
def acmix_san15(pretrained: bool = False, **kwargs: Any) -> ACmixSAN:
    """ACmix-SAN-15: 16.4 million parameters, 78.4 % top-1 on ImageNet in the paper."""
    return _create("acmix_san15", pretrained, **{"layers": (3, 2, 3, 5, 2), **kwargs})


@register_model
def acmix_san19(pretrained: bool = False, **kwargs: Any) -> ACmixSAN:
    """ACmix-SAN-19: 20.8 million parameters, 78.7 % top-1 on ImageNet in the paper."""
    return _create("acmix_san19", pretrained, **{"layers": (3, 3, 4, 6, 3), **kwargs})
