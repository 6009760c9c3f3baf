"""How large the network of a config is: parameters, and multiply-adds for one image."""

from dataclasses import dataclass

import torch

from acmix import models
from acmix.config import Config
from acmix.data.datasets import build_val_source
from acmix.engine.proof import explained
from acmix.telemetry.flops import multiply_adds


@dataclass(frozen=True)
class Size:
    """parameters: of the network; multiply_adds: of one forward pass over one image of the config's size."""

    parameters: int
    multiply_adds: int


def size_of(config: Config) -> Size:
    """Build the network without memory for its weights, pass an image through it, and count.

    The number of classes is that of the data, unless the config says it. Raises UserError: no such model, data or
    arguments, or a network that cannot take the config's images.
    """
    classes = config.model.num_classes or len(build_val_source(config).classes)
    kwargs = {**config.model.kwargs, "pretrained": False}
    with torch.device("meta"):
        model = models.create_model(config.model.name, classes, image_size=config.data.size, **kwargs)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    with explained(model, config):
        return Size(parameters, multiply_adds(model, (config.model.in_chans, *config.data.size)))
