"""What is measured of whole networks: rows of paths, lesions, similarity of layers, receptive field."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acmix.analysis.blocks import acmix_blocks, measuring
from acmix.analysis.cka import cka_matrix, layer_names, layer_outputs, linear_cka
from acmix.analysis.lesions import lesion_rows, lesioned, lesions_of
from acmix.analysis.paths import PathMeasures
from acmix.analysis.receptive_field import field_areas, receptive_field
from acmix.layers import ACmix, WindowAttention
from acmix.models import create_model


class Residual(nn.Module):
    """Stands for a network's block around ACmix."""

    def __init__(self, channels: int, stage: int, **arguments: Any) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.acmix = ACmix(channels, channels, heads=2, kernel_att=3, stage=stage, **arguments)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.acmix(self.norm(x))


def network(**arguments: Any) -> nn.Sequential:
    """A strided convolution, two blocks with local attention, and one with windows that need padding."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 2, 2),
        Residual(4, 1, **arguments),
        Residual(4, 2, **arguments),
        Residual(4, 2, attention=WindowAttention(2, 2, (3, 3)), **arguments),
        nn.Flatten(),
        nn.Linear(4 * 5 * 4, 3),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("alpha", "beta")):
                parameter.uniform_(-1, 1)
    return model.double()


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(6, 3, 10, 8, dtype=torch.float64)


def maps_of(model: nn.Sequential, images: Tensor, index: int) -> tuple[Tensor, Tensor, ACmix]:
    """What the paths of a block give, by their references."""
    block = model[index].acmix
    x = model[index].norm(model[:index](images))
    padded = block.attention.pad(x)
    q, k, v = block.qkv(padded.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).chunk(3, 1)
    attention = block.attention.finish(block.attention.reference(q, k, v), 1.0, None)[..., :5, :4]
    q, k, v = (m[..., :5, :4] for m in (q, k, v))
    return attention, block.convolution.reference(q, k, v), block


def measure(model: nn.Module, *batches: Tensor) -> list[dict[str, Any]]:
    measures = PathMeasures(model)
    with measuring(model):
        for batch in batches:
            measures.add(batch)
    return measures.rows()


@torch.no_grad()
def test_rows_hold_what_the_references_of_both_paths_give(images: Tensor) -> None:
    model = network().eval()
    rows = measure(model, images)
    assert [(row["layer"], row["stage"], row["depth"]) for row in rows] == [
        ("1.acmix", 1, 1),
        ("2.acmix", 2, 2),
        ("3.acmix", 2, 3),
    ]
    for index, row in enumerate(rows, start=1):
        attention, convolution, block = maps_of(model, images, index)
        a, c = block.mix.alpha * attention, block.mix.beta * convolution
        assert row["alpha"] == pytest.approx(block.mix.alpha.item())
        assert row["attention_rms"] == pytest.approx(a.square().mean().sqrt().item())
        assert row["convolution_rms"] == pytest.approx(c.square().mean().sqrt().item())
        expected = row["attention_rms"] / (row["attention_rms"] + row["convolution_rms"])
        assert row["attention_share"] == pytest.approx(expected)
        assert row["cosine"] == pytest.approx(torch.cosine_similarity(a.flatten(), c.flatten(), dim=0).item())
        assert 0 < row["entropy_bits"] <= math.log2(9)
        assert len(row["distance_px_heads"]) == 2
        assert row["shift_distance"] == 0.0
        assert 0 <= row["attention_high_share"] <= 1


def test_distances_are_in_pixels_of_the_image(images: Tensor) -> None:
    model = network()
    with torch.no_grad():
        model[1].acmix.qkv.weight.zero_()
        model[1].acmix.qkv.bias.zero_()
    # the nine members of an inner window lie at 0, four at 2 pixels, four at 2 √2; a border reflects them, no nearer
    assert measure(model, images)[0]["distance_px"] == pytest.approx((4 * 2 + 4 * 2 * math.sqrt(2)) / 9)


def test_batches_and_processes_add_up(images: Tensor) -> None:
    model = network()
    whole = measure(model, images)
    in_parts = measure(model, images[:1], images[1:4], images[4:])
    ranks = [PathMeasures(model), PathMeasures(model)]
    with measuring(model):
        ranks[0].add(images[:2])
        ranks[1].add(images[2:])
    for first, second in zip(ranks[0].blocks.values(), ranks[1].blocks.values(), strict=True):
        first.load(first.vector() + second.vector())
    for rows in (in_parts, ranks[0].rows()):
        for row, expected in zip(rows, whole, strict=True):
            for key, value in row.items():
                assert value == (value if isinstance(value, str) else pytest.approx(expected[key])), key


def test_measuring_leaves_no_trace(images: Tensor) -> None:
    model = network().train()
    model[2].eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = torch.get_rng_state()
    measure(model, images)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("mix", "present", "absent"), [("attention",) * 2 + ("convolution",), ("convolution",) * 2 + ("attention",)]
)
def test_what_a_block_of_one_path_lacks_is_none(mix: str, present: str, absent: str, images: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 2, 2), Residual(4, 1, mix=mix)).double()
    (row,) = measure(model, images)
    assert row[f"{present}_rms"] > 0
    assert row[f"{absent}_rms"] is row["attention_share"] is row["cosine"] is row[f"{absent}_high_share"] is None
    assert (row["entropy_bits"] is None) == (mix == "convolution")
    assert {lesion.path for lesion in lesions_of(model)} == {present}


def test_a_model_without_blocks_has_nothing_to_measure(images: Tensor) -> None:
    model = nn.Conv2d(3, 3, 1).double()
    assert measure(model, images) == []
    assert lesions_of(model) == []


def test_there_is_a_lesion_for_each_block_stage_and_path() -> None:
    places = [{"layer": f"{i}.acmix"} for i in (1, 2, 3)] + [{"stage": 1}, {"stage": 2}, {"stage": "all"}]
    found = [(lesion.place, lesion.path, lesion.mode) for lesion in lesions_of(network())]
    assert found == [
        (place, path, mode) for place in places for path in ("attention", "convolution") for mode in ("zero", "mean")
    ]


@torch.no_grad()
def test_a_lesion_leaves_the_other_path_and_ends_with_its_context(images: Tensor) -> None:
    model = network().eval()
    measures = PathMeasures(model)
    whole = measures.add(images)
    means = {name: sums.mean_outputs() for name, sums in measures.blocks.items()}
    attention, convolution, block = maps_of(model, images, 2)
    x = model[:2](images)
    torch.testing.assert_close(means["2.acmix"]["attention"], attention.mean((0, 2, 3)))
    alpha, beta = block.mix.weights()
    left = {
        ("attention", "zero"): beta * convolution,
        ("attention", "mean"): alpha * attention.mean((0, 2, 3), keepdim=True) + beta * convolution,
        ("convolution", "zero"): alpha * attention,
        ("convolution", "mean"): alpha * attention + beta * convolution.mean((0, 2, 3), keepdim=True),
    }
    for lesion in lesions_of(model):
        if lesion.place == {"layer": "2.acmix"}:
            with lesioned(lesion, means):
                hurt = model(images)
            torch.testing.assert_close(hurt, model[3:](x + left[lesion.path, lesion.mode]))
    torch.testing.assert_close(model(images), whole)


def test_rows_of_lesions_say_what_is_lost() -> None:
    (lesion, *_) = lesions_of(network())
    assert lesion_rows([lesion], [(60.0, 1.5)], 90.0, 0.25) == [
        {
            "layer": "1.acmix",
            "path": "attention",
            "mode": "zero",
            "top1": 60.0,
            "delta_top1": -30.0,
            "loss": 1.5,
            "delta_loss": 1.25,
        }
    ]


def test_cka_is_that_of_the_centred_features() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 2, 2, dtype=torch.float64)
    a, b = x - x.mean(0), y.flatten(1) - y.flatten(1).mean(0)
    expected = (b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    assert linear_cka(x, y) == pytest.approx(expected.item())
    turned = 3 * x @ torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0] + 1
    torch.testing.assert_close(cka_matrix([x, y], [turned, y])[0, 0].item(), 1.0)
    torch.testing.assert_close(cka_matrix([x, y], [turned, y])[1, 0].item(), expected.item())
    assert math.isnan(linear_cka(torch.ones(7, 3), x))


def test_layers_are_the_modules_around_the_blocks(images: Tensor) -> None:
    model = network().eval()
    assert layer_names(model) == ["1", "2", "3"]
    outputs = layer_outputs(model, images, layer_names(model))
    with torch.no_grad():
        torch.testing.assert_close(outputs[1], model[:3](images))
    assert [out.requires_grad for out in outputs] == [False] * 3


class Convolutions(nn.Module):
    """Three convolutions of ones: the field of the middle is a known pyramid."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Conv2d(1, 1, 3, padding=1, bias=False) for _ in range(2)])
        for layer in self.layers:
            nn.init.ones_(layer.weight)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_the_receptive_field_of_two_convolutions_is_their_kernels_convolved() -> None:
    field = receptive_field(Convolutions(), [torch.randn(2, 1, 9, 9), torch.randn(1, 1, 9, 9)])
    ramp = torch.tensor([0, 0, 1, 2, 3, 2, 1, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(field, torch.outer(ramp, ramp))
    # of 81: the middle holds 9, the middle 3 × 3 hold 49, the 5 × 5 all
    assert field_areas(field, [0.1, 0.5, 0.6, 0.61, 0.99]) == pytest.approx(
        {0.1: 1 / 81, 0.5: 9 / 81, 0.6: 9 / 81, 0.61: 25 / 81, 0.99: 25 / 81}
    )


def test_an_even_map_has_four_cells_in_its_middle() -> None:
    field = receptive_field(Convolutions(), [torch.randn(1, 1, 6, 8)])
    torch.testing.assert_close(field, field.flip(0, 1))
    with pytest.raises(ValueError, match="no images"):
        receptive_field(Convolutions(), [])


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("acmix_resnet26", {"stem": "cifar", "base_width": 8, "layers": (1, 1, 1, 1)}),
        ("acmix_swin_tiny", {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 8, "depths": (2, 1),
                             "heads": (2, 4)}),
    ],
)  # fmt: skip
def test_every_family_can_be_measured(name: str, arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = create_model(name, 5, image_size=(32, 32), **arguments)
    images = torch.randn(2, 3, 32, 32)
    rows = measure(model, images)
    assert len(rows) == len(acmix_blocks(model)) > 1
    assert all(isinstance(row[key], float) for row in rows for key in ("attention_share", "entropy_bits", "cosine"))
    field = receptive_field(model, [images])
    assert field.shape == (32, 32)
    areas = field_areas(field)
    assert 0 < areas[0.2] <= areas[0.5] <= areas[0.99] <= 1
    outputs = layer_outputs(model, images, layer_names(model))
    torch.testing.assert_close(cka_matrix(outputs, outputs).diagonal(), torch.ones(len(rows), dtype=torch.float64))
