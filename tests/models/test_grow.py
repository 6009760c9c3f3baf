"""Networks grown out of plain ones: exact where a path is added, close where a convolution is approximated."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from acmix import models
from acmix.config import load_config
from acmix.data.loader import build_data
from acmix.errors import UserError
from acmix.layers import ACmix, path_weights

ROOT = Path(__file__).resolve().parents[2]
NANO = {"embed_dim": 8, "depths": (2, 1), "window_size": 3, "num_classes": 5}
NARROW = {"num_classes": 5, "stem": "cifar", "base_width": 8}
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-10}
SIZES = [(52, 36), (44, 60)]  # maps of 13 × 9 and 11 × 15: windows do not tile them, merging pads them


def trained(network: nn.Module, size: tuple[int, int], steps: int = 3) -> nn.Module:
    """The network after a few large steps on noise: norms, biases and tables are no longer what they began as."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    torch.manual_seed(1)
    for _ in range(steps):
        images, targets = torch.randn(4, 3, *size), torch.randint(0, 5, (4,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), targets).backward()
        optimizer.step()
    return network.eval()


def grows_exactly(source: nn.Module, network: nn.Module, size: tuple[int, int]) -> None:
    """The network grown out of the source gives its logits, in float32 and float64, on images of this size."""
    for dtype, limit in LIMITS.items():
        plain, grown = copy.deepcopy(source).to(dtype).eval(), copy.deepcopy(network).to(dtype).eval()
        growth = models.grow(grown, plain.state_dict())
        assert growth.exact
        assert growth.layers
        images = torch.randn(2, 3, *size, dtype=dtype)
        with torch.no_grad():
            wanted = plain(images)
            assert (grown(images) - wanted).abs().max() <= limit * wanted.abs().max().clamp_min(1)


def timm_swin(size: tuple[int, int], name: str = "swin_tiny_patch4_window7_224", **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, img_size=size, drop_path_rate=0.0, **kwargs)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("steps", [0, 3])
def test_timms_swin_gives_the_same_logits_grown(size: tuple[int, int], steps: int) -> None:
    source = trained(timm_swin(size, num_heads=(2, 4), **NANO), size, steps)
    network = models.create_model("acmix_swin_tiny", image_size=size, heads=(2, 4), **NANO)
    grows_exactly(source, network, size)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "small"])
def test_timms_full_swin_gives_the_same_logits_grown(name: str) -> None:
    source = timm_swin((224, 224), f"swin_{name}_patch4_window7_224").eval()
    network = models.create_model(f"acmix_swin_{name}")
    grows_exactly(source, network, (224, 224))


SOURCES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("acmix_swin_tiny", {"mix": "attention"}, {}),
    ("acmix_swin_tiny", {"mix": "convolution"}, {}),
    ("acmix_swin_tiny", {"mix": "convolution", "shift": "fixed"}, {}),
    ("acmix_swin_tiny", {"mix": "convolution", "shift": "shift"}, {}),
    ("acmix_swin_tiny", {"mix": "sum"}, {}),
    ("acmix_swin_tiny", {"mix": "convex"}, {}),
    ("acmix_swin_tiny", {"mix": "attention"}, {"mix": "convex"}),
    ("acmix_resnet26", {"mix": "attention"}, {}),
    ("acmix_resnet26", {"mix": "convolution"}, {}),
    ("acmix_resnet26", {"mix": "convolution", "shift": "full"}, {"shift": "full"}),
    ("acmix_resnet26", {"mix": "convolution"}, {"shift": "full"}),
    ("acmix_resnet26", {"mix": "learned"}, {}),
    ("acmix_san10", {"block": "plain"}, {}),
    ("acmix_san10", {"mix": "convolution"}, {}),
    ("acmix_pvt_tiny", {"mix": "attention"}, {}),
    ("acmix_pvt_tiny", {"mix": "sum"}, {}),
]
SHAPES: dict[str, dict[str, Any]] = {
    "acmix_swin_tiny": {**NANO, "heads": (2, 4), "drop_path_rate": 0.0},
    "acmix_resnet26": NARROW,
    "acmix_san10": {"stem": "cifar", "base_width": 16, "layers": (1, 1, 1, 1, 1)},
    "acmix_pvt_tiny": {
        "patch_size": 2, "embed_dims": (8, 16), "heads": (1, 2), "depths": (1, 2), "reductions": (2, 1),
        "mlp_ratios": (2, 2), "drop_path_rate": 0.0,
    },
}  # fmt: skip


@pytest.mark.parametrize(("name", "source_kwargs", "kwargs"), SOURCES)
def test_our_own_networks_give_the_same_logits_with_a_path_more(
    name: str, source_kwargs: dict[str, Any], kwargs: dict[str, Any]
) -> None:
    size = (28, 20) if "swin" in name or "pvt" in name else (17, 13)
    shape = SHAPES[name]
    source = trained(models.create_model(name, image_size=size, **shape, **source_kwargs), size)
    network = models.create_model(name, image_size=size, **shape, **kwargs)
    grows_exactly(source, network, size)


@pytest.mark.parametrize(("mix", "old", "new"), [("attention", "alpha", "beta"), ("convolution", "beta", "alpha")])
def test_the_new_path_has_no_weight_but_a_gradient_at_once(mix: str, old: str, new: str) -> None:
    source = models.create_model("acmix_resnet26", mix=mix, **NARROW)
    network = models.create_model("acmix_resnet26", **NARROW)
    fresh = copy.deepcopy(network.state_dict())
    growth = models.grow(network, source.state_dict())
    network(torch.randn(2, 3, 16, 16)).square().sum().backward()
    for name, weight in path_weights(network).items():
        assert weight.item() == (1.0 if name.endswith(old) else 0.0)
        assert name in growth.new
        assert weight.grad is not None
        assert weight.grad.abs() > 0, name
    inside = [name for name in growth.new if not name.endswith((old, new))]
    assert inside
    assert all(torch.equal(network.state_dict()[name], fresh[name]) for name in inside)  # their usual start


def test_a_share_is_the_first_weight_of_the_new_path() -> None:
    source = models.create_model("acmix_resnet26", mix="attention", **NARROW)
    network = models.create_model("acmix_resnet26", **NARROW)
    growth = models.grow(network, source.state_dict(), share=0.25)
    assert not growth.exact
    for name, weight in path_weights(network).items():
        assert weight.item() == (0.75 if name.endswith("alpha") else 0.25)
    with pytest.raises(UserError, match="share"):
        models.grow(network, source.state_dict(), share=1.0)


def test_tensors_dropped_are_named_and_another_classifier_is_drawn_anew() -> None:
    size = (52, 36)
    source = timm_swin(size, num_heads=(2, 4), **NANO).state_dict()
    source["layers.0.blocks.1.attn_mask"] = torch.zeros(1)
    network = models.create_model("acmix_swin_tiny", image_size=size, heads=(2, 4), **{**NANO, "num_classes": 7})
    growth = models.grow(network, source)
    assert growth.dropped.keys() == {"layers.0.blocks.1.attn_mask", "head.fc.weight", "head.fc.bias"}
    assert {"head.fc.weight", "head.fc.bias"} <= set(growth.new)
    assert any("7 classes is drawn anew" in line for line in growth.lines())


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ({"layers": (1, 1, 1, 1)}, "other depths"),
        ({"stem": "imagenet"}, "another stem"),
        ({"base_width": 16}, "another stem"),
        ({"heads": 2}, "other widths, heads"),
    ],
)
def test_a_source_that_does_not_fit_is_refused_before_anything_changes(source: dict[str, Any], reason: str) -> None:
    weights = models.create_model("acmix_resnet26", **{**NARROW, "mix": "attention", **source}).state_dict()
    network = models.create_model("acmix_resnet26", **NARROW)
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(UserError, match=reason):
        models.grow(network, weights)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_weights_that_differ_within_a_stage_are_refused_where_it_has_one_for_all() -> None:
    shape = {**NARROW, "layers": (2, 1, 1, 1)}
    source = models.create_model("acmix_resnet26", **shape).state_dict()
    tied = models.create_model("acmix_resnet26", mix={"tied": True}, **shape)
    models.grow(tied, source)
    source["layer1.1.acmix.mix.alpha"].fill_(0.25)
    with pytest.raises(UserError, match=r"layer1\.1\.acmix: mix\.tied"):
        models.grow(tied, source)


def test_a_checkpoint_around_the_weights_and_weights_without_numbers_are_named_as_such(plain: nn.Module) -> None:
    network = models.create_model("acmix_resnet26", **NARROW)
    with pytest.raises(UserError, match="no state dict: these entries are no tensors: model, epoch"):
        models.grow(network, {"model": plain.state_dict(), "epoch": 3})  # type: ignore[dict-item]
    with pytest.raises(UserError, match=r"on the meta device: conv1\.weight"):
        models.grow(network, plain.state_dict() | {"conv1.weight": torch.zeros(8, 3, 7, 7, device="meta")})


def test_a_tensor_more_or_less_is_refused_by_name() -> None:
    weights = models.create_model("acmix_resnet26", block="plain", **NARROW).state_dict()
    network = models.create_model("acmix_resnet26", **NARROW)
    with pytest.raises(UserError, match=r"unexpected: layer1\.0\.se\.fc\.weight"):
        models.grow(network, {**weights, "layer1.0.se.fc.weight": torch.zeros(1)})
    del weights["layer2.0.bn3.weight"]
    with pytest.raises(UserError, match=r"missing: layer2\.0\.bn3\.weight"):
        models.grow(network, weights)


def test_kernels_that_the_target_cannot_hold_are_refused() -> None:
    plain = models.create_model("acmix_resnet26", block="plain", **NARROW).state_dict()
    full = models.create_model("acmix_resnet26", mix="convolution", shift="full", **NARROW).state_dict()
    for weights, kwargs, way_out in [
        (plain, {"shift": "fixed"}, "shift=learned"),
        (plain, {"mix": "attention"}, "no convolution path"),
        (plain, {"mix": "sum"}, "mix=learned"),
        (full, {}, "shift=full"),
    ]:
        with pytest.raises(UserError, match=way_out):
            models.grow(models.create_model("acmix_resnet26", **NARROW, **kwargs), weights)


def blobs(batches: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (32, 3, 16, 16) of five classes: stripes of five frequencies in noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.linspace(0, 1, 16)
    waves = torch.stack([torch.sin((2 + 5 * k) * x) for k in range(5)])
    for _ in range(batches):
        targets = torch.randint(0, 5, (32,), generator=generator)
        noise = torch.randn(32, 3, 16, 16, generator=generator)
        yield 2 * waves[targets][:, None, None, :] + noise, targets


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    """A plain ResNet trained for a few steps."""
    torch.manual_seed(0)
    network = models.create_model("acmix_resnet26", block="plain", **NARROW)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for images, targets in blobs(16, 0):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), targets).backward()
        optimizer.step()
    return network.eval()


def distance(plain: nn.Module, network: nn.Module) -> float:
    """Of the logits of two networks, in standard deviations of the first's."""
    images = next(blobs(1, 2))[0]
    with torch.no_grad():
        wanted, found = plain(images), network.eval()(images)
    return float((found - wanted).square().mean().sqrt() / (wanted - wanted.mean(0)).square().mean().sqrt())


def test_a_plain_resnet_grown_with_images_stays_close_to_its_logits(plain: nn.Module) -> None:
    calibration = [images for images, _ in blobs(2, 1)]
    apart = {}
    for shift in ("learned", "full"):
        network = models.create_model("acmix_resnet26", shift=shift, **NARROW)
        growth = models.grow(network, plain.state_dict(), calibration=calibration)
        apart[shift] = distance(plain, network)
        assert not growth.exact
        assert len(growth.layers) == 8
        assert all(0.5 < layer.energy <= 1 and 0.5 < layer.fit <= 1 for layer in growth.layers)  # type: ignore[operator]
        assert all(
            weight.item() == (0 if name.endswith("alpha") else 1) for name, weight in path_weights(network).items()
        )
    blind = models.create_model("acmix_resnet26", **NARROW)
    models.grow(blind, plain.state_dict())
    assert apart["full"] < apart["learned"] < 0.5 * distance(plain, blind)


def test_a_resnet_grown_with_images_classifies_before_any_training(plain: nn.Module) -> None:
    network = models.create_model("acmix_resnet26", **NARROW)
    models.grow(network, plain.state_dict(), calibration=[images for images, _ in blobs(2, 1)])
    [(images, targets)] = blobs(1, 3)
    with torch.no_grad():
        right = [float((net.eval()(images).argmax(1) == targets).float().mean()) for net in (plain, network)]
    assert right[0] > 0.9  # a random start would have 0.2
    assert right[1] > right[0] - 0.2


@pytest.mark.parametrize("calibration", [[], [torch.zeros(0, 3, 16, 16)]], ids=["no batch", "an empty batch"])
def test_a_calibration_without_images_is_refused_before_anything_changes(plain: nn.Module, calibration: list) -> None:
    network = models.create_model("acmix_resnet26", **NARROW)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(UserError, match="calibration: it holds no images"):
        models.grow(network, plain.state_dict(), calibration=iter(calibration))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_regrouping_is_refused_where_there_is_nothing_to_regroup() -> None:
    source = models.create_model("acmix_resnet26", mix="convolution", **NARROW)
    network = models.create_model("acmix_resnet26", **NARROW)
    with pytest.raises(UserError, match="regroup: no convolution is approximated here"):
        models.grow(network, source.state_dict(), regroup=True)


def test_images_without_variance_give_a_network_and_finite_shares(plain: nn.Module) -> None:
    network = models.create_model("acmix_resnet26", **NARROW)
    growth = models.grow(network, plain.state_dict(), calibration=[torch.zeros(2, 3, 1, 1)])
    assert all(0 <= layer.fit <= 1 for layer in growth.layers)  # type: ignore[operator]
    assert all(value.isfinite().all() for value in network.state_dict().values())


def test_full_rank_kernels_are_the_convolution_itself(plain: nn.Module) -> None:
    """With as many maps as input channels nothing is lost, whatever order the channels are in."""
    for regroup in (False, True):
        network = models.create_model("acmix_resnet26", shift="full", heads=(8, 8, 8, 8), **NARROW)
        growth = models.grow(network, plain.state_dict(), regroup=regroup)
        first = growth.layers[0]  # 8 channels, 24 maps a group
        assert first.energy == pytest.approx(1)
        block = network.get_submodule("layer1.0")
        maps = torch.randn(2, 8, 9, 7).relu()
        with torch.no_grad():
            wanted = plain.get_submodule("layer1.0.bn2")(plain.get_submodule("layer1.0.conv2")(maps)).relu()
            wanted = plain.get_submodule("layer1.0.conv3")(wanted)
            assert isinstance(block.acmix, ACmix)
            found = block.conv3(block.bn2.eval()(block.acmix(maps)).relu())
        assert torch.allclose(found, wanted, atol=1e-4)


def test_regrouping_keeps_more_energy(plain: nn.Module) -> None:
    kept = []
    for regroup in (False, True):
        network = models.create_model("acmix_resnet26", **NARROW)
        growth = models.grow(network, plain.state_dict(), regroup=regroup)
        kept.append(sum(layer.energy or 0 for layer in growth.layers))
    assert kept[1] > kept[0]


@pytest.mark.slow
def test_on_the_digits_a_grown_network_is_far_ahead_of_a_random_start() -> None:
    """Before any training, and after one epoch of it, by a margin that a seed does not change."""
    config = load_config(ROOT / "configs" / "quickstart.yaml", ["data.num_workers=0"])
    data = build_data(config)

    def train(network: nn.Module, epochs: int, lr: float) -> None:
        optimizer = torch.optim.AdamW(network.parameters(), lr=lr)
        for epoch in range(epochs):
            for [batch] in data.train.epoch(epoch):
                optimizer.zero_grad()
                nn.functional.cross_entropy(network.train()(batch.images), batch.targets).backward()
                optimizer.step()

    def top1(network: nn.Module) -> float:
        hits, count = 0, 0
        for batch in data.val:
            with torch.no_grad():
                hits += int((network.eval()(batch.images).argmax(1) == batch.targets).sum())
            count += len(batch.targets)
        return 100 * hits / count

    torch.manual_seed(0)
    shape = {"stem": "cifar", "base_width": 8}
    plain, fresh, grown = (
        models.create_model("acmix_resnet26", 10, **shape, **more) for more in ({"block": "plain"}, {}, {})
    )
    train(plain, 4, 4e-3)
    models.grow(grown, plain.state_dict(), calibration=[batch.images for [batch] in data.train.epoch(0)][:4])
    assert top1(plain) > 85
    assert top1(grown) > top1(plain) - 5
    train(grown, 1, 4e-4)
    train(fresh, 1, 4e-3)
    assert top1(grown) > top1(fresh) + 20
