"""ACmix-ResNet: bottleneck residual networks whose 3×3 convolution is an ACmix block with local attention.

Paper: On the Integration of Self-Attention and Convolution, CVPR 2022, https://arxiv.org/abs/2111.14556, table 2.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, create_classifier
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from acmix.layers import ACmix, LocalAttention, path_weights, tie_path_weights
from acmix.models.checks import check_positive, check_rates
from acmix.models.drop_path import drop_path_rates
from acmix.models.layout import fast_layout
from acmix.models.official import OfficialNames, register_official
from acmix.models.placed import placed

STAGES = ("layer1", "layer2", "layer3", "layer4")


class Bottleneck(nn.Module):
    """1×1 convolution, ACmix, 1×1 convolution, with a shortcut around them.

    Args:
        in_channels: Channels of the input map.
        width: Channels of the block in the middle; the output has 4 · width.
        stride: Of the ACmix block and the shortcut.
        drop_path: Probability of leaving the branch out, per image, in training.
        plain: Put an ordinary 3×3 convolution where ACmix stands.
        acmix: Further arguments of the ACmix block.
    """

    expansion = 4
    conv_norms = (("conv1", "bn1"), ("acmix", "bn2"), ("conv2", "bn2"), ("conv3", "bn3"))  # for acmix.fuse

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int = 1,
        drop_path: float = 0.0,
        *,
        plain: bool = False,
        **acmix: Any,
    ) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.acmix = None if plain else ACmix(width, width, stride=stride, **acmix)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False) if plain else None
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.act = nn.ReLU(inplace=True)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.bn1(self.conv1(x)))
        if self.acmix is not None:
            out = self.acmix(out)
        elif self.conv2 is not None:
            out = self.conv2(out)
        out = self.act(self.bn2(out))
        out = self.drop_path(self.bn3(self.conv3(out)))
        out += self.downsample(x)
        return self.act(out)


class ACmixResNet(nn.Module):
    """ACmix-ResNet for images (B, in_chans, H, W).

    The plain twin is `block: plain`, the ResNet of the paper's comparison; `mix: attention` and `mix: convolution` have
    one path of the block alone. Recipe and everything around the blocks stay the same.

    Args:
        layers: Bottlenecks in each of the four stages.
        num_classes: Width of the classifier; 0 leaves it out.
        in_chans: Channels of the images.
        global_pool: timm's name of the pooling before the classifier.
        stem: `imagenet`, a 7×7 convolution of stride 2 and max pooling, or `cifar`, a 3×3 convolution of stride 1 and
            no pooling, for images of about 32×32.
        block: `acmix`, or `plain` for the ResNet that the paper compares with: an ordinary 3×3 convolution in its place
            (13.7 million parameters for layers 1, 2, 4, 1).
        base_width: Channels of the stem and of the first stage's blocks; every other width follows.
        heads: Heads of every block, or one number for each stage.
        kernel_att: Window of the local attention, where the map is not smaller.
        kernel_conv: Kernel of the convolution path.
        mix: Mode of `acmix.layers.PathMix`, or a mapping of its arguments, such as {per: head}.
        shift: Kind of `acmix.layers.ShiftConv`.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0.
        zero_init_last: Start the last normalisation of every branch at 0, so that blocks start as identities.
        impl: Implementation of the local attention.

    Raises:
        ValueError: for arguments that do not fit together.
    """

    conv_norms = (("conv1", "bn1"),)  # for acmix.fuse

    @placed
    def __init__(
        self,
        layers: Sequence[int] = (1, 2, 4, 1),
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        stem: str = "imagenet",
        block: str = "acmix",
        base_width: int = 64,
        heads: int | Sequence[int] = 4,
        kernel_att: int = 7,
        kernel_conv: int = 3,
        mix: str | dict[str, Any] = "learned",
        shift: str = "learned",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        zero_init_last: bool = False,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        check_positive(base_width=base_width, in_chans=in_chans)
        check_rates(drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        if stem not in ("imagenet", "cifar"):
            raise ValueError(f"unknown stem {stem!r}: choose imagenet or cifar")
        if block not in ("acmix", "plain"):
            raise ValueError(f"unknown block {block!r}: choose acmix or plain")
        if len(layers) != len(STAGES) or min(layers) < 1:
            raise ValueError(f"layers must be {len(STAGES)} numbers of at least 1, got {list(layers)}")
        stage_heads = [heads] * len(STAGES) if isinstance(heads, int) else list(heads)
        if len(stage_heads) != len(STAGES):
            raise ValueError(f"heads must be one number or {len(STAGES)}, got {stage_heads}")
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.grad_checkpointing = False
        self._build_stem(in_chans, base_width, stem)
        shared = {"kernel_att": kernel_att, "kernel_conv": kernel_conv, "mix": mix, "shift": shift, "impl": impl}
        shared["plain"] = block == "plain"
        self._build_stages(layers, base_width, drop_path_rate, [{"heads": n, **shared} for n in stage_heads])
        self.num_features: int = self.feature_info[-1]["num_chs"]
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.init_weights(zero_init_last)
        tie_path_weights(self)

    def _build_stem(self, in_chans: int, width: int, stem: str) -> None:
        imagenet = stem == "imagenet"
        kernel, stride = (7, 2) if imagenet else (3, 1)
        self.conv1 = nn.Conv2d(in_chans, width, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if imagenet else nn.Identity()
        self.feature_info: list[dict[str, Any]] = [{"num_chs": width, "reduction": stride, "module": "act1"}]

    def _build_stages(
        self, layers: Sequence[int], base_width: int, drop_path_rate: float, blocks: list[dict[str, Any]]
    ) -> None:
        channels = base_width
        reduction = 1 if isinstance(self.maxpool, nn.Identity) else 4
        drop_paths = drop_path_rates(drop_path_rate, layers)
        for index, (name, depth) in enumerate(zip(STAGES, layers, strict=True)):
            stage = nn.Sequential()
            for position in range(depth):
                stride = 2 if index > 0 and position == 0 else 1
                width, drop_path = base_width * 2**index, drop_paths[index][position]
                stage.append(Bottleneck(channels, width, stride, drop_path, stage=index + 1, **blocks[index]))
                channels = width * Bottleneck.expansion
            self.add_module(name, stage)
            reduction *= 1 if index == 0 else 2
            self.feature_info.append({"num_chs": channels, "reduction": reduction, "module": name})

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = False) -> None:
        """Kaiming initialisation of the convolutions and projections; the blocks' own parts keep what they set."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, ACmix):
                nn.init.normal_(module.qkv.weight, std=math.sqrt(2 / module.out_channels))
            elif isinstance(module, Bottleneck) and zero_init_last:
                nn.init.zeros_(module.bn3.weight)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the path weights."""
        return set(path_weights(self))

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Patterns that order the parameters by depth, for layer-wise learning rates."""
        return {"stem": r"^(?:conv1|bn1)\.", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each bottleneck in the backward pass instead of keeping its intermediate maps."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer, or Identity without classes."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier, and another pooling if named, in place of the present one."""
        self.num_classes = num_classes
        like = next(self.parameters())
        self.global_pool, self.fc = create_classifier(
            self.num_features,
            num_classes,
            pool_type=self.global_pool.pool_type if global_pool is None else global_pool,
        )
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
        x = self.maxpool(x)
        for index, name in enumerate(STAGES, start=1):
            if stop_early and index > last:
                break
            x = self._stage(name, x)
            if index in take:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last index, and the classifier; returns the indices kept."""
        take, last = feature_take_indices(len(self.feature_info), indices)
        for name in STAGES[last:]:
            self.add_module(name, nn.Sequential())
        if last < len(STAGES):
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or last < len(STAGES):
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the last stage's map (B, num_features, h, w)."""
        x = self.maxpool(self._stem(x))
        for name in STAGES:
            x = self._stage(name, x)
        return x

    def _stem(self, x: Tensor) -> Tensor:
        return self.act1(self.bn1(self.conv1(fast_layout(x))))

    def _stage(self, name: str, x: Tensor) -> Tensor:
        stage = self.get_submodule(name)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(stage, x)
        return stage(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map to logits, or to pooled features (B, head_hidden_size) if `pre_logits`."""
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _create(variant: str, pretrained: bool, **kwargs: Any) -> ACmixResNet:
    return build_model_with_cfg(ACmixResNet, variant, pretrained, **kwargs)


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
    {f"{name}.untrained": dict(_CFG) for name in ("acmix_resnet26", "acmix_resnet38", "acmix_resnet50")}
)


@register_model
def acmix_resnet26(pretrained: bool = False, **kwargs: Any) -> ACmixResNet:
    """ACmix-ResNet-26: 10.5 million parameters, 76.1 % top-1 on ImageNet in the paper."""
    return _create("acmix_resnet26", pretrained, **{"layers": (1, 2, 4, 1), **kwargs})


@register_model
def acmix_resnet38(pretrained: bool = False, **kwargs: Any) -> ACmixResNet:
    """ACmix-ResNet-38: 14.4 million parameters, 77.4 % top-1 on ImageNet in the paper."""
    return _create("acmix_resnet38", pretrained, **{"layers": (2, 3, 5, 2), **kwargs})


@register_model
def acmix_resnet50(pretrained: bool = False, **kwargs: Any) -> ACmixResNet:
    """ACmix-ResNet-50: 18.3 million parameters, 77.8 % top-1 on ImageNet in the paper."""
    return _create("acmix_resnet50", pretrained, **{"layers": (3, 4, 6, 3), **kwargs})


register_official(
    OfficialNames(
        network=ACmixResNet,
        attention=LocalAttention,
        layer="conv2",
        block={
            "qkv.weight": ("conv1.weight", "conv2.weight", "conv3.weight"),
            "qkv.bias": ("conv1.bias", "conv2.bias", "conv3.bias"),
            "attention.position_weight": ("conv_p.weight",),
        },
        pointwise=frozenset({"conv1.weight", "conv2.weight", "conv3.weight", "conv_p.weight"}),
        without_effect=frozenset({"conv2.conv_p.bias"}),  # it cancels in the difference of two positions
    )
)
