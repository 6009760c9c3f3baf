"""ACmix-PVT: the pyramid vision transformer whose attention is an ACmix block with spatial reduction.

Paper: On the Integration of Self-Attention and Convolution, CVPR 2022, https://arxiv.org/abs/2111.14556, table 2; the
network around the block is Pyramid Vision Transformer, https://arxiv.org/abs/2102.12122.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from acmix.layers import PathMix, path_weights, tie_path_weights
from acmix.models.checks import check_positive, check_rates
from acmix.models.drop_path import drop_path_rates
from acmix.models.placed import placed
from acmix.models.pvt_blocks import EPS, PVTStage, resize_position
from acmix.models.pvt_blocks import PVTBlock as PVTBlock  # for who imports it from here, as older pickles do

POOLS = ("token", "avg", "max", "")


class ACmixPVT(nn.Module):
    """ACmix-PVT for images (B, in_chans, H, W) of any size.

    The last stage has a class token that the classifier reads. It takes part in the attention, and goes past the
    convolution path: alpha · attention is all it gets. In the last block nothing reads the map but the token, before
    the convolution path would have added to it, so that block has none: it would be a path whose parameters and beta
    never get a gradient. Without the token (`class_token=False`, and with the mix `convolution`, through which no token
    could see the image) the classifier reads the mean of the map, and the last block is like the others.

    The plain twin is `mix: attention`, which is PVT itself (13,229,288 parameters for `acmix_pvt_tiny`, 24,485,864 for
    `acmix_pvt_small`), and `mix: convolution` has the convolution path alone, with q, k and v at full resolution.

    Args:
        img_size: Size of the images that the positions are made for; for others they are interpolated at the call.
        patch_size: Side of the patches of the first stage; it is 2 in the others.
        in_chans: Channels of the images.
        num_classes: Width of the classifier; 0 leaves it out.
        global_pool: What the classifier reads: `token`, or `avg` or `max` of the map; None is `token` where there is
            one, else `avg`. The empty name leaves everything as it is.
        embed_dims: Channels of each stage.
        depths: Blocks in each stage.
        heads: Heads in each stage.
        reductions: By how much each stage reduces its map for k and v; 1 in a stage with a class token.
        mlp_ratios: Hidden width of the perceptrons over their channels, in each stage.
        class_token: Whether the last stage has a class token.
        kernel_conv: Kernel of the convolution path.
        conv_shares: What the convolution path gets: `qkv`, q with the reduced k and v brought to its size, or `q`; see
            `acmix.layers.ReducedAttention`.
        mix: Mode of `acmix.layers.PathMix`, or a mapping of its arguments, such as {per: head}.
        shift: Kind of `acmix.layers.ShiftConv`; its layer over the map index has no bias, so that the path folds.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after positions and blocks and in the perceptrons.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0.
        impl: `reference` holds for both paths and `cpp` for the convolution path; other names leave the choice to them.

    Raises:
        ValueError: for arguments that do not fit together.
    """

    output_fmt = "NHWC"

    @placed
    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        heads: Sequence[int] = (1, 2, 5, 8),
        reductions: Sequence[int] = (8, 4, 2, 1),
        mlp_ratios: Sequence[float] = (8.0, 8.0, 4.0, 4.0),
        class_token: bool = True,
        kernel_conv: int = 3,
        conv_shares: str = "qkv",
        mix: str | dict[str, Any] = "learned",
        shift: str = "learned",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        per_stage = (embed_dims, depths, heads, reductions, mlp_ratios)
        if not depths or len({len(values) for values in per_stage}) > 1:
            raise ValueError(
                "embed_dims, depths, heads, reductions and mlp_ratios need one number a stage, got "
                + ", ".join(str(list(values)) for values in per_stage)
            )
        check_positive(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dims=tuple(embed_dims),
            depths=tuple(depths),
            reductions=tuple(reductions),
        )
        check_rates(drop_rate=drop_rate, proj_drop_rate=proj_drop_rate, drop_path_rate=drop_path_rate)
        self.num_classes, self.in_chans = num_classes, in_chans
        self.has_token = class_token and PathMix.build(mix, 1, 1, 1).has_attention
        if self.has_token and reductions[-1] != 1:
            raise ValueError(
                f"the last of reductions is {reductions[-1]}, but a class token attends to a map that is not reduced: "
                "make it 1, or set class_token to false"
            )
        self.global_pool = self._checked_pool(global_pool)
        block = {
            "proj_drop": proj_drop_rate,
            "conv_shares": conv_shares,
            "kernel_conv": kernel_conv,
            "mix": mix,
            "shift": shift,
            "impl": impl,
        }
        drop_paths = drop_path_rates(drop_path_rate, depths)
        self.stages = nn.ModuleList()
        self.feature_info: list[dict[str, Any]] = []
        size, channels, reduction = to_2tuple(img_size), in_chans, 1
        for index, dim in enumerate(embed_dims):
            last = index == len(depths) - 1
            patch = patch_size if index == 0 else 2
            size, reduction = (max(1, size[0] // patch), max(1, size[1] // patch)), reduction * patch
            shared = {"heads": heads[index], "reduction": reductions[index], "mlp_ratio": mlp_ratios[index]}
            blocks = [{**block, **shared, "stage": index + 1, "drop_path": rate} for rate in drop_paths[index]]
            if last and self.has_token:
                blocks[-1]["mix"] = "attention"
            self.stages.append(PVTStage(channels, dim, patch, size, last and self.has_token, blocks))
            self.feature_info.append({"num_chs": dim, "reduction": reduction, "module": f"stages.{index}"})
            channels = dim
        self.num_features = self.head_hidden_size = channels
        self.norm: nn.Module = nn.LayerNorm(channels, EPS)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(channels, num_classes) if num_classes > 0 else nn.Identity()
        self.init_weights()
        tie_path_weights(self)

    def _checked_pool(self, name: str | None) -> str:
        """The pooling of this name; raises ValueError."""
        if name is None:
            return "token" if self.has_token else "avg"
        if name not in POOLS:
            raise ValueError(f"unknown global_pool {name!r}: choose token, avg, max or the empty name")
        if name == "token" and not self.has_token:
            raise ValueError("global_pool 'token': there is no class token here, choose avg or max")
        return name

    @torch.jit.ignore
    def init_weights(self) -> None:
        """PVT's initialisation of linear layers, tokens and positions; the convolution paths keep what they set."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, PVTStage):
                for parameter in (module.pos_embed, module.cls_token, module.cls_pos_embed):
                    if parameter is not None:
                        trunc_normal_(parameter, std=0.02)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the path weights and the class token; PVT decays the positions."""
        tokens = {name for name, _ in self.named_parameters() if name.endswith(".cls_token")}
        return tokens | set(path_weights(self))

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that order the parameters by depth, for layer-wise learning rates."""
        fine = [
            (r"^stages\.(\d+)\.(?:proj|norm|pos_embed|cls_)", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        stem = r"^stages\.0\.(?:proj|norm|pos_embed)"
        return {"stem": stem, "blocks": [(r"^stages\.(\d+)", None), (r"^norm", (99999,))] if coarse else fine}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its intermediate maps."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer, or Identity without classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier, and another pooling if named, in place of the present one."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = self._checked_pool(global_pool)
        like = next(self.parameters())
        head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.head = head.to(like.device, like.dtype).train(self.training)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Maps (B, C, h, w) after each stage, without the class token; timm's arguments, `norm` is the last stage's."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt {output_fmt!r} is not offered: choose NCHW")
        take, last = feature_take_indices(len(self.stages), indices)
        intermediates, token = [], None
        for index, stage in enumerate(self.stages):
            if stop_early and index > last:
                break
            x, token = stage(x)
            if index in take:
                normed = self._normed(x) if norm and index == len(self.feature_info) - 1 else x
                intermediates.append(normed)
        if intermediates_only:
            return intermediates
        complete = x.shape[1] == self.num_features
        return self._features(x, token) if complete else x.flatten(2).mT[:, None], intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last index, and the final norm and classifier; returns the indices kept."""
        take, last = feature_take_indices(len(self.stages), indices)
        cut = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if prune_norm or cut:
            self.norm = nn.Identity()
        if cut:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
            self.has_token = False
        if prune_head or cut:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to (B, 1, T + h · w, num_features): the class token if there is one, then the pixels, normalised.

        A row and not a map, because the token has no place in a map; `forward_intermediates` gives the maps.
        """
        token = None
        for stage in self.stages:
            x, token = stage(x)
        return self._features(x, token)

    def _features(self, x: Tensor, token: Tensor | None) -> Tensor:
        x = x.flatten(2).mT
        if self.has_token and token is not None:
            x = torch.cat((token, x), 1)
        return self.norm(x)[:, None]

    def _normed(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """What `forward_features` gives to logits, or to pooled features (B, num_features) if `pre_logits`."""
        if self.global_pool == "token":
            x = x[:, 0, 0]
        elif self.global_pool:
            pixels = x[:, 0, int(self.has_token) :]
            x = pixels.mean(1) if self.global_pool == "avg" else pixels.amax(1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights of a network for images of another size: timm's hook, which interpolates the positions."""
    positions = {
        f"{name}.pos_embed": stage.size for name, stage in model.named_modules() if isinstance(stage, PVTStage)
    }
    return {
        name: resize_position(value, positions[name]) if name in positions else value
        for name, value in state_dict.items()
    }


def _create(variant: str, pretrained: bool, **kwargs: Any) -> ACmixPVT:
    feature_cfg = {"out_indices": tuple(range(len(kwargs["depths"]))), "feature_cls": "getter"}
    return build_model_with_cfg(
        ACmixPVT, variant, pretrained, feature_cfg=feature_cfg, pretrained_filter_fn=checkpoint_filter_fn, **kwargs
    )


_CFG = {
    "url": "",
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": (1, 50),  # the class token and 7 × 7 pixels, in a row
    "crop_pct": 0.9,
    "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "stages.0.proj",
    "classifier": "head",
    "paper_ids": "arXiv:2111.14556",
    "paper_name": "On the Integration of Self-Attention and Convolution",
}

default_cfgs = generate_default_cfgs(
    {f"{name}.untrained": dict(_CFG) for name in ("acmix_pvt_tiny", "acmix_pvt_small")}
)


@register_model
def acmix_pvt_tiny(pretrained: bool = False, **kwargs: Any) -> ACmixPVT:
    """ACmix-PVT-T: 13.4 million parameters, 78.0 % top-1 on ImageNet in the paper."""
    return _create("acmix_pvt_tiny", pretrained, **{"depths": (2, 2, 2, 2), **kwargs})


@register_model
def acmix_pvt_small(pretrained: bool = False, **kwargs: Any) -> ACmixPVT:
    """ACmix-PVT-S: 24.8 million parameters, 81.7 % top-1 on ImageNet in the paper."""
    return _create("acmix_pvt_small", pretrained, **{"depths": (3, 4, 6, 3), **kwargs})
