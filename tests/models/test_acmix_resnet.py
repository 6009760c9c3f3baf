"""What is particular to ACmix-ResNet: stems, widths, heads, sizes."""

import pytest
import timm
import torch

from acmix import models  # noqa: F401 - registers the networks

SMALL = {"num_classes": 5, "base_width": 8}


def test_the_cifar_stem_keeps_the_resolution():
    model = timm.create_model("acmix_resnet26", stem="cifar", **SMALL).eval()
    assert model.forward_features(torch.randn(1, 3, 32, 32)).shape == (1, 256, 4, 4)


@pytest.mark.parametrize("size", [(32, 32), (40, 150), (7, 5)], ids=str)
def test_images_so_small_that_maps_are_smaller_than_the_window_are_taken(size):
    model = timm.create_model("acmix_resnet26", **SMALL).eval()
    assert model(torch.randn(1, 3, *size)).isfinite().all()


def test_base_width_scales_every_width():
    info = timm.create_model("acmix_resnet26", stem="cifar", features_only=True, **SMALL).feature_info
    assert info.channels() == [8, 32, 64, 128, 256]
    assert info.reduction() == [1, 1, 2, 4, 8]


def test_heads_may_differ_between_stages():
    model = timm.create_model("acmix_resnet26", heads=(1, 2, 4, 8), **SMALL)
    assert [getattr(model, f"layer{i}")[0].acmix.heads for i in (1, 2, 3, 4)] == [1, 2, 4, 8]


def test_zero_init_last_starts_every_block_as_its_shortcut():
    torch.manual_seed(0)
    model = timm.create_model("acmix_resnet26", zero_init_last=True, stem="cifar", **SMALL).eval()
    block = model.layer3[1]
    x = torch.rand(1, 128, 8, 8)
    torch.testing.assert_close(block(x), x)
