"""A backbone of timm's registry, ours among them, under torchvision's feature pyramid."""

from argparse import ArgumentParser
from collections import OrderedDict
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

import acmix.models  # noqa: F401 - registers our networks with timm
from acmix.config.yaml import read_arguments
from acmix.errors import UserError, one_line
from acmix.process.program import whole_number

_TRIAL = (3, 64, 96)  # an image that a backbone has to take


class FeatureMaps(nn.Module):
    """The maps of a network's last stages under the names "0", "1", ..., finest first, each (B, C, H, W).

    `channels`, `strides`, `mean` and `std` say what a head has to know.

    Args:
        name: Name in timm's registry.
        levels: Number of stages.
        weights: File of trained weights, .safetensors, such as `model.safetensors` of a checkpoint. The network's batch
            norms are then frozen, since the batches of dense prediction are too small to estimate statistics anew.
        kwargs: Arguments of the network.
    """

    def __init__(self, name: str, levels: int = 4, weights: Path | None = None, **kwargs: Any) -> None:
        super().__init__()
        if weights is not None:
            kwargs |= {"pretrained": True, "pretrained_cfg_overlay": {"file": str(weights)}}
        network: Any = timm.create_model(name, features_only=True, **kwargs)
        self.network, info = network, network.feature_info
        self.channels, self.strides = info.channels()[-levels:], info.reduction()[-levels:]
        self.mean, self.std = network.default_cfg["mean"], network.default_cfg["std"]
        if weights is not None:
            freeze_norms(self)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.network(images)[-len(self.channels) :]
        if getattr(self.network, "output_fmt", "NCHW") == "NHWC":
            maps = [x.permute(0, 3, 1, 2) for x in maps]
        return OrderedDict((str(level), x) for level, x in enumerate(maps))


def pyramid(features: FeatureMaps, width: int = 256, extra: ExtraFPNBlock | None = None) -> BackboneWithFPN:
    """torchvision's feature pyramid over these maps: `width` channels a level, and `extra` levels on top."""
    backbone = BackboneWithFPN(nn.Sequential(), {}, features.channels, width, extra)
    backbone.body = features  # torchvision can only cut a network into its children, which suits few of them
    return backbone


def freeze_norms(module: nn.Module) -> None:
    """Put a constant scale and shift in place of every batch norm."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, child.eps)
            frozen.load_state_dict(child.state_dict(), strict=False)  # it counts no batches
            setattr(module, name, frozen)
        else:
            freeze_norms(child)


def add_backbone_arguments(parser: ArgumentParser) -> None:
    """--model, --weights, --width and KEY=VALUE."""
    add = parser.add_argument
    add("--model", default="acmix_resnet26", metavar="NAME", help="backbone, any of timm's registry (acmix_resnet26)")
    add("--weights", type=Path, metavar="FILE", help="trained weights of the backbone, .safetensors")
    add("--width", type=whole_number, default=256, metavar="N", help="channels of the feature pyramid (256)")
    add("kwargs", nargs="*", metavar="KEY=VALUE", help="arguments of the backbone, such as base_width=16 stem=cifar")


def build_features(name: str, levels: int, weights: Path | None, settings: Sequence[str]) -> FeatureMaps:
    """The maps of the network that a command line names. Raises UserError."""
    kwargs = read_arguments(settings)
    if not timm.is_model(name):
        nearest = ", ".join(get_close_matches(name, timm.list_models(), n=1))
        hint = f"; did you mean {nearest}?" if nearest else "; timm.list_models() in Python lists all names"
        raise UserError(f"--model {name}: timm has no such network{hint}")
    if weights is not None and not (weights.suffix == ".safetensors" and weights.is_file()):
        raise UserError(f"--weights {weights}: no such file, or not .safetensors")
    asked = " ".join([name, *settings] if weights is None else [name, *settings, "--weights", str(weights)])
    try:
        features = FeatureMaps(name, levels, weights, **kwargs)
    except (TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"--model {asked}: {one_line(error)}") from error
    try:
        with torch.no_grad():
            features.eval()(torch.zeros(1, *_TRIAL))
    except (AssertionError, ValueError, RuntimeError) as error:
        size = "×".join(map(str, _TRIAL))
        raise UserError(
            f"--model {asked}: takes no image of {size}, but has to take any size: {one_line(error)}"
        ) from error
    return features.train()


def pick_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
