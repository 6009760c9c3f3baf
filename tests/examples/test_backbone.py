"""Networks of ours and of timm's under torchvision's feature pyramid."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from acmix.errors import UserError
from backbone import FeatureMaps, build_features, freeze_norms, pyramid

NANO = {"embed_dim": 12, "depths": (1, 1, 1, 1), "heads": (1, 2, 2, 4)}
NARROW = {"base_width": 8}


@pytest.mark.parametrize(
    ("name", "kwargs"), [("acmix_resnet26", NARROW), ("acmix_swin_tiny", NANO), ("convnext_atto", {})]
)
def test_maps_of_a_rectangular_image_of_odd_size_have_the_strides_and_channels_that_are_named(name, kwargs):
    features = FeatureMaps(name, levels=3, **kwargs).eval()
    with torch.no_grad():
        maps = features(torch.rand(1, 3, 130, 165))
        levels = pyramid(features, 16)(torch.rand(1, 3, 130, 165))
    assert list(maps) == ["0", "1", "2"]
    assert features.strides == [8, 16, 32]
    for x, channels, stride in zip(maps.values(), features.channels, features.strides, strict=True):
        assert x.shape[1] == channels
        assert x.shape[2] in (130 // stride, -(-130 // stride))
    assert [tuple(levels[name].shape[2:]) for name in maps] == [tuple(x.shape[2:]) for x in maps.values()]


@pytest.mark.parametrize(
    ("name", "kwargs"), [("acmix_resnet26", {**NARROW, "impl": "reference"}), ("acmix_swin_tiny", NANO)]
)
def test_a_checkpoint_s_weights_go_into_the_backbone_and_its_norms_are_frozen(name, kwargs, tmp_path: Path):
    network = timm.create_model(name, num_classes=5, **kwargs).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    features = FeatureMaps(name, weights=tmp_path / "model.safetensors", **kwargs).train()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in features.modules())
    images = torch.rand(1, 3, 128, 128, dtype=torch.float64)
    with torch.no_grad():
        expected = network.double().forward_intermediates(images, intermediates_only=True)[-1]
        features.double().eval()  # drop path is no norm
        torch.testing.assert_close(features(images)["3"], expected)


def test_frozen_norms_do_in_training_what_they_did_in_evaluation():
    block = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    nn.init.uniform_(block[1].running_mean)
    images = torch.rand(2, 3, 5, 5)
    expected = block.eval()(images)
    freeze_norms(block)
    torch.testing.assert_close(block.train()(images), expected)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("acmix_resnet", [], "--model acmix_resnet"),
        ("acmix_resnet62", [], "did you mean acmix_resnet26"),
        ("acmix_resnet26", ["base_width"], "KEY=VALUE"),
        ("acmix_resnet26", ["base_width=8", "in_chans=1"], "takes no image of 3×64×96"),
        ("vit_tiny_patch16_224", [], "takes no image of 3×64×96"),
        ("acmix_resnet26", ["base_width=0"], "base_width"),
    ],
)
def test_a_backbone_that_cannot_be_built_is_named(name, settings, message):
    with pytest.raises(UserError, match=message):
        build_features(name, 4, None, settings)


def test_weights_that_are_none_or_of_another_network_are_one_line(tmp_path: Path):
    (tmp_path / "none.safetensors").write_bytes(b"no weights")
    save_file(timm.create_model("acmix_resnet26", **NARROW).state_dict(), tmp_path / "narrow.safetensors")
    for name in ("none", "narrow"):
        with pytest.raises(UserError, match=f"{name}.safetensors: ") as refusal:
            build_features("acmix_resnet26", 4, tmp_path / f"{name}.safetensors", ["base_width=16"])
        assert "\n" not in str(refusal.value)
