"""create_model: what it builds and how it refuses."""

import pickle
from pathlib import Path

import pytest
import timm
from timm.models import build_model_with_cfg, register_model
from torch import nn

from acmix import models
from acmix.errors import UserError

TINY = {"base_width": 8, "layers": [1, 1, 1, 1], "stem": "cifar"}


def test_lists_from_yaml_are_taken():
    model = models.create_model("acmix_resnet26", 7, **TINY, heads=[1, 2, 4, 8])
    assert model.get_classifier().out_features == 7


def test_timms_own_networks_are_built_too():
    assert models.create_model("test_resnet", 5).num_classes == 5


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("acmix_resnet25", {}, r"no model 'acmix_resnet25'; did you mean acmix_resnet"),
        ("ACMIX_RESNET-26", {}, r"did you mean acmix_resnet26"),
        ("swin_tiny_patch4_window7_244", {}, "did you mean swin_tiny_patch4_window7_224"),
        ("hf-hub:someone/network", {}, "no model 'hf-hub:someone/network'"),
        ("my_network", {}, "lists all names. A model of your own is known once its file is imported"),
        ("local-dir:/tmp", {}, "no model 'local-dir:/tmp'"),
        ("acmix_resnet26", {"base_with": 8}, r"model\.kwargs\.base_with: .*did you mean base_width"),
        ("acmix_swin_tiny", {"kernel_att": 7}, r"model\.kwargs\.kernel_att: .*did you mean kernel_conv"),
        ("test_resnet", {"zzz": 1}, r"model\.kwargs\.zzz: test_resnet takes no such argument"),
        ("acmix_resnet26", {"heads": "4"}, r"model\.kwargs\.heads: '4' does not fit"),
        ("acmix_resnet26", {"base_width": 8.5}, r"model\.kwargs\.base_width: 8\.5 does not fit"),
        ("acmix_resnet26", {"mix": "both"}, "unknown mix 'both'.*learned"),
        ("acmix_resnet26", {"shift": "both"}, "unknown shift 'both'.*full"),
        ("acmix_resnet26", {"stem": "small"}, "unknown stem 'small'"),
        ("acmix_resnet26", {"layers": [1, 2]}, "layers must be 4 numbers"),
        ("acmix_resnet26", {"heads": 3}, "do not divide into 3 heads"),
        ("acmix_resnet26", {"drop_path_rate": 1.5}, "drop_path_rate.*1.5"),
        ("acmix_resnet26", {"impl": "cuda"}, "unknown impl 'cuda'"),
        ("acmix_swin_tiny", {"impl": "cuda"}, "unknown impl 'cuda'"),
        ("acmix_swin_tiny", {"window_size": 0}, "window_size"),
        ("acmix_swin_tiny", {"depths": [2, 2]}, "one positive number a stage"),
        ("acmix_swin_tiny", {"drop_rate": -0.1}, "drop_rate.*-0.1"),
        ("acmix_swin_tiny", {"mlp_ratio": 0}, "mlp_ratio of 0 leaves a perceptron over 96 channels no hidden layer"),
        ("acmix_swin_tiny", {"mlp_ratio": float("nan")}, "mlp_ratio of nan"),
        ("acmix_pvt_tiny", {"mlp_ratios": [8, 8, 4, -1]}, "mlp_ratio of -1 .* over 512 channels"),
        ("acmix_pvt_tiny", {"depths": []}, "depths, .* need one number a stage"),
        ("acmix_resnet26", {"pretrained": True}, "No pretrained weights"),
        ("acmix_resnet26", {"features_only": True}, r"model\.kwargs\.features_only is not allowed"),
    ],
)
def test_what_cannot_be_built_is_refused_by_key_and_with_the_way_out(name, kwargs, message):
    with pytest.raises(UserError, match=message):
        models.create_model(name, **kwargs)


class Loosely(nn.Linear):
    """A user's network whose annotations say little, or what only its own file understands."""

    def __init__(self, sizes: list[int], norm: "Norm" = None, scale=1, num_classes=2, in_chans=3):  # noqa: F821
        super().__init__(sum(sizes), num_classes)


@register_model
def loosely(pretrained=False, **kwargs) -> Loosely:
    return build_model_with_cfg(Loosely, "loosely", pretrained, **kwargs)


@register_model
def unannotated(pretrained=False, **kwargs):
    return build_model_with_cfg(Loosely, "unannotated", pretrained, **kwargs)


@pytest.mark.parametrize("name", ["loosely", "unannotated"])
def test_a_users_network_is_built_whatever_its_annotations(name):
    assert models.create_model(name, 5, sizes=[3, 4], norm="batch", scale=2).weight.shape == (5, 7)
    with pytest.raises(UserError, match=rf"model\.kwargs\.size: {name} takes no such argument"):
        models.create_model(name, 5, size=[3, 4])


def test_a_users_network_that_its_entry_point_names_gets_the_nearest_argument():
    with pytest.raises(UserError, match=r"did you mean sizes\?"):
        models.create_model("loosely", 5, size=[3, 4])


class Hostile:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return Path.touch, (self.witness,)


@pytest.mark.parametrize("wrap", [lambda path: {"checkpoint_path": path}, lambda path: {"pretrained_cfg": path}])
def test_no_file_is_unpickled_through_the_arguments(wrap, tmp_path):
    file, witness = tmp_path / "weights.pth", tmp_path / "executed"
    file.write_bytes(pickle.dumps(Hostile(witness)))
    with pytest.raises(UserError, match=r"model\.checkpoint"):
        models.create_model("test_resnet", **wrap(str(file)))
    overlay = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(file)}}
    with pytest.raises(UserError, match=r"model\.checkpoint"):
        models.create_model("test_resnet", **overlay)
    assert not witness.exists()


def test_every_network_is_registered_with_timm():
    names = {name for name in timm.list_models() if name.startswith("acmix_")}
    families = {"resnet": (26, 38, 50), "san": (10, 15, 19), "pvt_": ("tiny", "small"), "swin_": ("tiny", "small")}
    assert names == {f"acmix_{family}{size}" for family, sizes in families.items() for size in sizes}
