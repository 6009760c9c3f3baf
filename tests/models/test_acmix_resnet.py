"""What is particular to ACmix-ResNet: stems, widths, heads, sizes."""

import pytest
import timm
import torch

from acmix import models  # noqa: F401 - registers the networks
from acmix.models.pooling import MaxPool2d

SMALL = {"num_classes": 5, "base_width": 8}


def test_the_cifar_stem_keeps_the_resolution_so_that_the_last_map_fits_the_window():
    model = timm.create_model("acmix_resnet26", stem="cifar", **SMALL).eval()
    assert model.forward_features(torch.randn(1, 3, 32, 32)).shape == (1, 256, 4, 4)


def test_the_imagenet_stem_on_small_images_is_refused_with_the_map_and_the_way_out():
    model = timm.create_model("acmix_resnet26", **SMALL)
    with pytest.raises(
        ValueError, match=r"2×2 map is too small for kernel_size 7.*larger input, a smaller kernel_size"
    ):
        model(torch.randn(1, 3, 32, 32))


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


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(8, 8), (7, 10), (1, 3)])
def test_the_stems_pooling_is_pytorchs_to_the_last_bit_with_ties_and_nan(layout, size):
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)).mul(2).round().relu()
    x[0, 0, 0, 0] = torch.nan
    grad = torch.randn(2, 3, *(-(-side // 2) for side in size))
    results = []
    for pool in (MaxPool2d(3, 2, 1), torch.nn.MaxPool2d(3, 2, 1)):
        leaf = x.contiguous(memory_format=layout).requires_grad_()
        out = pool(leaf)
        out.backward(grad)
        results.append([pool(leaf.detach()), out.detach(), leaf.grad])
    assert results[0][0].stride() == results[1][0].stride()
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)
