"""Weights that were made for images of another size or number of channels."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from acmix import models
from acmix.checkpoint.weights import load_weights, start_from
from acmix.errors import UserError

SWIN = {"embed_dim": 8, "heads": [1, 2, 2, 4], "patch_size": 2, "window_size": 4}


def build(name: str, classes: int = 5, **kwargs: Any) -> nn.Module:
    return models.create_model(name, classes, **kwargs).eval()


def write(model: nn.Module, folder: Path) -> str:
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "w.safetensors")
    return str(folder / "w.safetensors")


@pytest.mark.parametrize(
    ("name", "before", "after", "tables"),
    [
        ("acmix_swin_tiny", {"image_size": (32, 32), **SWIN}, {"image_size": (24, 48), **SWIN}, 8),
        ("test_vit", {"img_size": 160}, {"img_size": [64, 48]}, 1),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 24}, {"embed_dim": 24, "img_size": 64}, 8),
    ],
)
def test_positions_are_interpolated_for_another_size_and_a_line_says_so(
    name: str, before: dict, after: dict, tables: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, model = build(name, **before), build(name, **after)
    start_from(model, write(made, tmp_path), models.load_official)
    said = capsys.readouterr().err
    assert said.startswith("warning: ")
    assert f"w.safetensors: {tables} of its tables of positions are for another size of image; interpolated" in said
    assert said.count("\n") == 1
    shapes = {key: value.shape for key, value in made.state_dict().items()}
    assert all(
        torch.equal(value, made.state_dict()[key])
        for key, value in model.state_dict().items()
        if value.shape == shapes[key]
    )


def test_a_constant_position_bias_stays_that_constant_whatever_the_windows() -> None:
    made, model = (build("acmix_swin_tiny", image_size=size, **SWIN) for size in ((32, 32), (24, 48)))
    weights = {
        name: torch.full_like(value, 0.7) if name.endswith("bias_table") else value
        for name, value in made.state_dict().items()
    }
    load_weights(model, weights, "file", models.load_official)
    for name, value in model.state_dict().items():
        if name.endswith("bias_table"):
            torch.testing.assert_close(value, torch.full_like(value, 0.7))


def test_a_table_of_unknown_windows_is_refused() -> None:
    made = build("acmix_swin_tiny", image_size=(64, 48), **{**SWIN, "window_size": [4, 6]})
    model = build("acmix_swin_tiny", image_size=(64, 64), **SWIN)
    with pytest.raises(UserError, match=r"file: the weights do not fit ACmixSwin: .*not that of a square window"):
        load_weights(model, made.state_dict(), "file", models.load_official)


@pytest.mark.parametrize(
    ("name", "kwargs", "key"),
    [
        ("acmix_resnet26", {"base_width": 8, "stem": "cifar"}, "conv1.weight"),
        ("acmix_swin_tiny", {"img_size": 32, **SWIN}, "patch_embed.proj.weight"),
        ("test_resnet", {}, "conv1.0.weight"),
    ],
)
def test_the_first_convolution_is_adapted_between_colour_and_grey(
    name: str, kwargs: dict, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    colour, grey, again = (build(name, in_chans=channels, **kwargs) for channels in (3, 1, 3))
    start_from(grey, write(colour, tmp_path), models.load_official)
    summed = colour.get_parameter(key).sum(1, keepdim=True)
    torch.testing.assert_close(grey.get_parameter(key), summed)
    start_from(again, write(grey, tmp_path), models.load_official)
    torch.testing.assert_close(again.get_parameter(key), summed.expand(-1, 3, -1, -1) / 3)
    first, second = capsys.readouterr().err.splitlines()
    assert "its first convolution is for images of 3 channels; adapted to 1" in first
    assert "its first convolution is for images of 1 channel; adapted to 3" in second
    image = torch.randn(2, 1, 32, 32)
    if name != "test_resnet":  # whose first layers would carry the rounding on
        torch.testing.assert_close(again(image.expand(-1, 3, -1, -1)), grey(image), rtol=1e-4, atol=1e-4)


def test_evaluation_does_not_adapt_channels() -> None:
    colour, grey = (build("acmix_resnet26", in_chans=channels, base_width=8) for channels in (3, 1))
    with pytest.raises(UserError, match=r"conv1\.weight"):
        load_weights(grey, colour.state_dict(), "file", models.load_official)


def test_weights_of_another_width_are_told_by_the_first_and_their_number() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    other = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2)).state_dict() | {"more": torch.zeros(1)}
    other.pop("1.bias")
    with pytest.raises(UserError) as caught:
        load_weights(model, other, "file", models.load_official)
    assert str(caught.value) == (
        "file: the weights do not fit Sequential: 0.weight is [4, 2], in the network [3, 2]; 0.bias is [4], in the "
        "network [3]; 1.weight is [2, 4], in the network [2, 3]; … 5 in all"
    )
    with pytest.raises(UserError, match=r"Sequential: 1\.bias is missing; more is not in the network$"):
        load_weights(nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2)), other, "file", models.load_official)
