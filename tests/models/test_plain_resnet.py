"""The plain twin: the ResNet the paper compares with."""

import timm
import torch

from acmix import models
from acmix.telemetry.probes.paths import path_layers


def test_plain_resnet26_is_the_papers_baseline() -> None:
    with torch.device("meta"):
        model = models.create_model("acmix_resnet26", 1000, block="plain")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 13.7  # the paper, table 2
    assert path_layers(model) == []


def test_plain_twin_has_the_shape_of_the_acmix_network() -> None:
    images = torch.randn(2, 3, 33, 35)
    shapes = []
    for block in ("acmix", "plain"):
        model = timm.create_model("acmix_resnet26", stem="cifar", base_width=8, block=block, features_only=True)
        shapes.append([feature.shape for feature in model(images)])
    assert shapes[0] == shapes[1]
