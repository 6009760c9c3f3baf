from typing import Any

import pytest
import timm
import torch
from torch import nn

from acmix import (
    ACmix,
    models,  # noqa: F401 - registers the models with timm
)
from acmix.telemetry.flops import multiply_adds


def local_attention_count(layers: tuple[int, ...]) -> int:
    """2 · 49 · channels · pixels for each block of an ACmix-ResNet at 224 × 224."""
    return sum(2 * 49 * 64 * 2**i * (56 // 2**i) ** 2 * n for i, n in enumerate(layers))


@pytest.mark.parametrize(
    ("name", "published", "attention"),
    [
        ("acmix_resnet26", 2.155e9, local_attention_count((1, 2, 4, 1))),
        ("acmix_swin_tiny", 4.645e9, 0),  # the authors' window attention is a matrix product: counted already
    ],
)
def test_counts_match_the_authors_code(name: str, published: float, attention: int) -> None:
    model = timm.create_model(name)
    assert multiply_adds(model) == pytest.approx(published + attention, rel=1e-3)


def test_the_count_does_not_depend_on_the_implementation() -> None:
    counts = {multiply_adds(ACmix(32, 32, impl=impl), (32, 14, 14)) for impl in ("auto", "reference")}
    assert len(counts) == 1


@pytest.mark.parametrize("block", [{}, {"stride": 2}, {"kernel_att": 3}, {"mix": "convolution"}, {"mix": "attention"}])
def test_a_block_counts_by_the_paper(block: dict[str, Any]) -> None:
    channels, heads, size, window = 32, 4, 15, block.get("kernel_att", 7)
    out = -(-size // block.get("stride", 1))
    projections = 3 * channels * channels * size**2
    attention = 2 * window**2 * channels * out**2
    convolution = 9 * 3 * channels * size**2 + 81 * channels * out**2
    expected = projections
    expected += 0 if block.get("mix") == "convolution" else attention
    expected += 0 if block.get("mix") == "attention" else convolution
    assert multiply_adds(ACmix(channels, channels, heads, **block), (channels, size, size)) == expected


def test_a_window_that_shrinks_on_a_small_map_is_counted_as_it_is() -> None:
    counts = [multiply_adds(ACmix(8, 8, 2, kernel_att=size), (8, 4, 3)) for size in (5, 7)]
    assert counts[0] == counts[1]


def test_counting_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    model[1].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert multiply_adds(model, (3, 8, 8)) == 3 * 4 * 9 * 36
    assert model.training
    assert not model[1].training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
