"""The authors' published code, imported from a clone that the user names; none of it is part of this project."""

import importlib.util
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from acmix.errors import UserError

_RESNETS = {"resnet26": (1, 2, 4, 1), "resnet38": (2, 3, 5, 2), "resnet50": (3, 4, 6, 3)}
_SWINS = {"swin_tiny": ((2, 2, 6, 2), 0.2), "swin_small": ((2, 2, 18, 2), 0.3)}


class Authors:
    """Builds the authors' blocks and networks.

    Args:
        clone: folder of a clone of github.com/LeapLabTHU/ACmix.

    Raises UserError when the clone lacks a file that is asked for, or for an unknown name.
    """

    def __init__(self, clone: Path) -> None:
        self.clone = clone

    def block(self, channels: int, stride: int = 1) -> nn.Module:
        """Their convolutional ACmix block, 7 × 7 attention and 4 heads."""
        return self._load("ResNet/test_bottleneck.py").ACmix(channels, channels, stride=stride)

    def network(self, name: str) -> nn.Module:
        """One of resnet26, resnet38, resnet50, swin_tiny, swin_small."""
        if name in _RESNETS:
            return self._resnet(list(_RESNETS[name]))
        if name in _SWINS:
            depths, drop_path = _SWINS[name]
            swin = self._load("Swin-Transformer/models/swin_transformer_acmix.py")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch.meshgrid has since got an argument
                return swin.SwinTransformer_acmix(depths=list(depths), drop_path_rate=drop_path)
        raise UserError(f"authors:{name}: choose one of {', '.join([*_RESNETS, *_SWINS])} or block:CHANNELSxSIZE")

    def _resnet(self, layers: list[int]) -> nn.Module:
        # Written for a torchvision that had this module; its one function is in torch.hub now.
        hub = ModuleType("torchvision.models.utils")
        vars(hub)["load_state_dict_from_url"] = torch.hub.load_state_dict_from_url
        block = self._load("ResNet/test_bottleneck.py")
        with _importable({"torchvision.models.utils": hub, "test_bottleneck": block}):
            return self._load("ResNet/ResNet_ImageNet.py").ACmix_ResNet(layers)

    def _load(self, file: str) -> Any:
        path = self.clone / file
        if not path.is_file():
            raise UserError(
                f"--authors {self.clone}: no {file} there; clone github.com/LeapLabTHU/ACmix and name its folder"
            )
        spec = importlib.util.spec_from_file_location(f"acmix_authors_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they import from places that timm has since renamed
            spec.loader.exec_module(module)
        return module


@contextmanager
def _importable(modules: dict[str, ModuleType]) -> Iterator[None]:
    """Let `import` find these modules for a while."""
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
