"""ACmix-Swin: the shifted-window transformer whose attention is an ACmix block with window attention.

Paper: On the Integration of Self-Attention and Convolution, CVPR 2022, https://arxiv.org/abs/2111.14556, table 3; the
network around the block is Swin Transformer, https://arxiv.org/abs/2103.14030.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, PatchEmbed, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from acmix.layers import WindowAttention, path_weights, tie_path_weights
from acmix.layers.fixed_size import with_fixed_size
from acmix.models.checks import check_positive, check_rates
from acmix.models.drop_path import drop_path_rates
from acmix.models.official import OfficialNames, register_official
from acmix.models.placed import placed
from acmix.models.swin_blocks import SwinBlock as SwinBlock  # for who imports it from here, as older pickles do
from acmix.models.swin_blocks import SwinStage
from acmix.models.windows import resize_bias_table


def _grid(patch_embed: PatchEmbed) -> tuple[int, int]:
    """Patches of an image of the size that `patch_embed` is built for, those that padding fills included."""
    grid: tuple[int, int] = patch_embed.dynamic_feat_size(patch_embed.img_size)
    return grid


def _halved(resolution: tuple[int, int]) -> tuple[int, int]:
    """Size of a map after patch merging."""
    return (resolution[0] + 1) // 2, (resolution[1] + 1) // 2


class ACmixSwin(nn.Module):
    """ACmix-Swin for images (B, in_chans, H, W).

    The plain twin is `mix: attention`, which is Swin itself, weight for weight as in timm; `mix: convolution` has the
    convolution path alone. Recipe and everything around the blocks stay the same.

    Args:
        img_size: Size of the images. It sets the windows, window_size or the stage's map where that is smaller, and
            with them the shapes of the parameters; images of any other size may be given at the call: maps
            that windows do not tile are padded.
        patch_size: Side of the patches; an image that they do not tile is padded.
        in_chans: Channels of the images.
        num_classes: Width of the classifier; 0 leaves it out.
        global_pool: timm's name of the pooling before the classifier.
        embed_dim: Channels of the first stage; each stage doubles them.
        depths: Blocks in each stage.
        heads: Heads in each stage.
        window_size: Side of the windows, or (height, width).
        mlp_ratio: Hidden width of the perceptrons over their channels.
        kernel_conv: Kernel of the convolution path.
        mix: Mode of `acmix.layers.PathMix`, or a mapping of its arguments, such as {per: head}.
        shift: Kind of `acmix.layers.ShiftConv`.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after the blocks and in the perceptrons.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0.
        impl: `reference` and `cpp` hold for the convolution path; other names leave the choice to it.

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
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int | tuple[int, int] = 7,
        mlp_ratio: float = 4.0,
        kernel_conv: int = 3,
        mix: str | dict[str, Any] = "learned",
        shift: str = "learned",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if len(heads) != len(depths) or not depths or min(depths) < 1:
            raise ValueError(f"depths and heads need one positive number a stage, got {list(depths)} and {list(heads)}")
        check_positive(
            img_size=img_size, patch_size=patch_size, window_size=window_size, embed_dim=embed_dim, in_chans=in_chans
        )
        check_rates(drop_rate=drop_rate, proj_drop_rate=proj_drop_rate, drop_path_rate=drop_path_rate)
        self.num_classes, self.in_chans, self.global_pool = num_classes, in_chans, global_pool
        self.patch_embed = PatchEmbed(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            norm_layer=nn.LayerNorm,
            strict_img_size=False,
            dynamic_img_pad=True,
            output_fmt=self.output_fmt,
        )
        resolution = _grid(self.patch_embed)
        self.always_partition = False
        self._windows_of_grid = to_2tuple(window_size), resolution
        block = {
            "mlp_ratio": mlp_ratio,
            "proj_drop": proj_drop_rate,
            "kernel_conv": kernel_conv,
            "mix": mix,
            "shift": shift,
            "impl": impl,
        }
        drop_paths = drop_path_rates(drop_path_rate, depths)
        self.feature_info: list[dict[str, Any]] = []
        self.layers = nn.Sequential()
        dim, in_dim = embed_dim, embed_dim
        for index, depth in enumerate(depths):
            if index > 0:
                dim, in_dim = 2 * dim, dim
                resolution = _halved(resolution)
            self.layers.append(
                SwinStage(
                    in_dim,
                    dim,
                    depth,
                    resolution,
                    to_2tuple(window_size),
                    drop_paths[index],
                    heads=heads[index],
                    stage=index + 1,
                    **block,
                )
            )
            self.feature_info.append({"num_chs": dim, "reduction": patch_size * 2**index, "module": f"layers.{index}"})
        self.num_features = dim
        self.norm: nn.Module = nn.LayerNorm(dim)
        self.head = ClassifierHead(
            dim, num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt=self.output_fmt
        )
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()
        self.init_weights()
        tie_path_weights(self)

    @torch.jit.ignore
    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
        window_size: int | tuple[int, int] | None = None,
        window_ratio: int | None = None,
        always_partition: bool | None = None,
    ) -> None:
        """Rebuild the windows for images of another size; timm's arguments, None leaves each as it is.

        Args:
            img_size: Size of the images.
            patch_size: Side of the patches; their projection is resampled.
            window_size: Side of the windows, or (height, width).
            window_ratio: Patches along a side of the image over those along a side of a window, in place of
                window_size. With neither, the windows grow and shrink with the image.
            always_partition: Cut and shift maps smaller than a window as larger ones.

        Position biases of windows that change are interpolated. Raises ValueError for sizes below 1.
        """
        given = {"img_size": img_size, "patch_size": patch_size, "window_size": window_size, "ratio": window_ratio}
        check_positive(**{name: size for name, size in given.items() if size is not None})
        self.patch_embed.set_input_size(
            img_size=None if img_size is None else to_2tuple(img_size), patch_size=patch_size
        )
        resolution = _grid(self.patch_embed)
        windows, made_for = self._windows_of_grid
        if window_size is not None:
            windows, made_for = to_2tuple(window_size), resolution
        elif window_ratio is not None:
            windows, made_for = tuple(max(1, side // window_ratio) for side in resolution), resolution
        self._windows_of_grid = windows, made_for
        windows = tuple(max(1, w * side // made) for w, side, made in zip(windows, resolution, made_for, strict=True))
        self.always_partition = self.always_partition if always_partition is None else always_partition
        for index, stage in enumerate(self.layers):
            if index > 0:
                resolution = _halved(resolution)
            assert isinstance(stage, SwinStage)
            stage.set_input_size(resolution, windows, self.always_partition)
        for index, info in enumerate(self.feature_info):
            info["reduction"] = max(self.patch_embed.patch_size) * 2**index

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Swin's initialisation of the linear layers; the ACmix blocks' convolution paths keep what they set."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the path weights and the relative position biases."""
        biases = {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}
        return biases | set(path_weights(self))

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that order the parameters by depth, for layer-wise learning rates."""
        fine = [
            (r"^layers\.(\d+)\.downsample", (0,)),
            (r"^layers\.(\d+)\.\w+\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^patch_embed", "blocks": r"^layers\.(\d+)" if coarse else fine}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its intermediate maps."""
        for stage in self.layers:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer, or Identity without classes."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier, and another pooling if named, in place of the present one."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = global_pool
        like = next(self.parameters())
        self.head = ClassifierHead(
            self.num_features,
            num_classes,
            pool_type=self.global_pool,
            drop_rate=self.head.drop.p,
            input_fmt=self.output_fmt,
        ).to(like.device, like.dtype)
        self.head.train(self.training)
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Maps (B, C, h, w) after each stage; timm's arguments, `norm` applies to the last stage's map."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt {output_fmt!r} is not offered: choose NCHW")
        take, last = feature_take_indices(len(self.layers), indices)
        intermediates = []
        x = self._embed(x)
        for index, stage in enumerate(self.layers):
            if stop_early and index > last:
                break
            x = stage(x)
            if index in take:
                normed = self.norm(x) if norm and index == len(self.layers) - 1 else x
                intermediates.append(normed.permute(0, 3, 1, 2))
        if intermediates_only:
            return intermediates
        return self.norm(x) if x.shape[-1] == self.num_features else x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last index, and the final norm and classifier; returns the indices kept."""
        take, last = feature_take_indices(len(self.layers), indices)
        cut = last < len(self.layers) - 1
        self.layers = self.layers[: last + 1]
        if prune_norm or cut:
            self.norm = nn.Identity()
        if cut:
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or cut:
            self.reset_classifier(0, "")
        return take

    def _embed(self, x: Tensor) -> Tensor:
        return self.patch_embed(with_fixed_size(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the normalised map of the last stage (B, h, w, num_features)."""
        return self.norm(self.layers(self._embed(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map to logits, or to pooled features (B, head_hidden_size) if `pre_logits`."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _create(variant: str, pretrained: bool, **kwargs: Any) -> ACmixSwin:
    feature_cfg = {"out_indices": tuple(range(len(kwargs["depths"]))), "feature_cls": "getter"}
    return build_model_with_cfg(
        ACmixSwin, variant, pretrained, feature_cfg=feature_cfg, pretrained_filter_fn=checkpoint_filter_fn, **kwargs
    )


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights of a network with other windows: timm's hook, which interpolates the position biases for these."""
    attentions = {name: module for name, module in model.named_modules() if isinstance(module, WindowAttention)}
    windows = {f"{name}.relative_position_bias_table": module.window_size for name, module in attentions.items()}
    return {
        name: resize_bias_table(value, windows[name]) if name in windows else value
        for name, value in state_dict.items()
    }


_CFG = {
    "url": "",
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": (7, 7),
    "crop_pct": 0.9,
    "interpolation": "bicubic",
    "fixed_input_size": True,
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "patch_embed.proj",
    "classifier": "head.fc",
    "paper_ids": "arXiv:2111.14556",
    "paper_name": "On the Integration of Self-Attention and Convolution",
}

default_cfgs = generate_default_cfgs(
    {f"{name}.untrained": dict(_CFG) for name in ("acmix_swin_tiny", "acmix_swin_small")}
)


@register_model
def acmix_swin_tiny(pretrained: bool = False, **kwargs: Any) -> ACmixSwin:
    """ACmix-Swin-T: 28.6 million parameters, 81.9 % top-1 on ImageNet in the paper."""
    return _create("acmix_swin_tiny", pretrained, **{"depths": (2, 2, 6, 2), **kwargs})


@register_model
def acmix_swin_small(pretrained: bool = False, **kwargs: Any) -> ACmixSwin:
    """ACmix-Swin-S: 50.3 million parameters, 83.5 % top-1 on ImageNet in the paper."""
    return _create("acmix_swin_small", pretrained, **{"depths": (2, 2, 18, 2), **kwargs})


def _official_name(name: str) -> str:
    """The authors' name of a tensor outside the blocks, from ours."""
    name = re.sub(r"^head\.fc\.", "head.", name)
    # the authors merge patches at the end of a stage, we at the beginning of the next
    return re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name)


register_official(
    OfficialNames(
        network=ACmixSwin,
        attention=WindowAttention,
        layer="attn",
        block={
            "qkv.weight": ("qkv.weight",),
            "qkv.bias": ("qkv.bias",),
            "attention.proj.weight": ("proj.weight",),
            "attention.proj.bias": ("proj.bias",),
            "attention.relative_position_bias_table": ("relative_position_bias_table",),
        },
        without_effect=frozenset({"attn.relative_position_index", "attn_mask"}),  # buffers, which we compute
        rename=_official_name,
    )
)
