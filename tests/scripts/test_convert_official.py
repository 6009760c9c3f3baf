"""The converter as a person runs it: a file in, a file out that plain timm loads, or one line that says why not."""

import pickle
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from acmix import models  # noqa: F401 - registers the networks
from scripts import convert_official


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> Path:
    """A ResNet-26 checkpoint under the authors' names, as their training script saves it, for 3 classes."""
    torch.manual_seed(0)
    weights = {}
    for key, value in timm.create_model("acmix_resnet26", num_classes=3).state_dict().items():
        block, _, inner = key.partition(".acmix.")
        if not inner:
            weights[key] = value
        elif inner.startswith("qkv."):
            kind = inner.removeprefix("qkv.")
            for i, part in enumerate(value.chunk(3), start=1):
                weights[f"{block}.conv2.conv{i}.{kind}"] = part[:, :, None, None] if kind == "weight" else part
        else:
            name, shape = {
                "attention.position_weight": ("conv_p.weight", (*value.shape, 1, 1)),
                "convolution.fc_weight": ("fc.weight", (*value.shape, 1, 1)),
                "convolution.shift_weight": ("dep_conv.weight", value.shape),
                "mix.alpha": ("rate1", (1,)),
                "mix.beta": ("rate2", (1,)),
            }[inner]
            weights[f"{block}.conv2.{name}"] = value.reshape(shape)
    path = tmp_path_factory.mktemp("official") / "resnet26.pth"
    wrapped = {f"module.{key}": value for key, value in weights.items()}
    torch.save({"epoch": 3, "state_dict": wrapped}, path)
    return path


def test_the_result_loads_with_plain_timm_and_is_not_overwritten_unasked(official, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    arguments = [str(official), str(out), "--model", "acmix_resnet26"]
    assert convert_official.main(arguments) == 0
    assert list(tmp_path.iterdir()) == [out]
    assert out.stat().st_mode == official.stat().st_mode
    torch.manual_seed(0)
    want = timm.create_model("acmix_resnet26", num_classes=3)
    got = timm.create_model("acmix_resnet26", num_classes=3)
    got.load_state_dict(load_file(out))
    assert all(torch.equal(a, b) for a, b in zip(got.state_dict().values(), want.state_dict().values(), strict=True))
    assert convert_official.main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert convert_official.main([*arguments, "--force"]) == 0


@pytest.mark.parametrize(
    ("out", "model", "message"),
    [
        ("out.safetensors", "acmix_resnet38", "missing: layer1.1.conv1.weight"),
        ("out.safetensors", "acmix_resnet27", "did you mean acmix_resnet26"),
        ("out.safetensors", "resnet26", "not ResNet"),
        ("out.pth", "acmix_resnet26", "must end in .safetensors"),
        ("/proc/out.safetensors", "acmix_resnet26", "OUT /proc/out.safetensors: cannot write there"),
    ],
)
def test_what_cannot_be_converted_is_one_error_and_leaves_nothing(official, tmp_path, capsys, out, model, message):
    assert convert_official.main([str(official), str(tmp_path / out), "--model", model]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert message in errors
    assert list(tmp_path.iterdir()) == []


def test_a_hostile_pickle_is_refused_and_not_executed(tmp_path, capsys):
    hostile, witness = tmp_path / "hostile.pth", tmp_path / "executed"
    hostile.write_bytes(pickle.dumps(_Touch(witness)))
    assert convert_official.main([str(hostile), str(tmp_path / "out.safetensors"), "--model", "acmix_resnet26"]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {hostile}")
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == [hostile]


class _Touch:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return Path.touch, (self.witness,)
