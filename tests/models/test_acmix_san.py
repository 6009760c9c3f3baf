"""ACmix-SAN and plain SAN: what is published of them, and any size of image."""

import io
from typing import Any

import pytest
import timm
import torch
from torch import nn

from acmix import fuse, models  # noqa: F401 - registers the networks
from acmix.layers import ACmix
from acmix.telemetry.flops import count_like_san, count_multiply_adds

SMALL = {"base_width": 16, "stem": "cifar", "kernel_att": (3, 3, 3, 3, 7), "layers": (1, 1, 1, 1, 1)}
# plain parameters to the digit; plain multiply-adds and the count of SAN's authors, in 10⁹; ACmix's of the paper
PUBLISHED = [
    ("acmix_san10", 11_841_124, 1.791, 1.865, 12.1, 1.9),
    ("acmix_san15", 16_181_310, 2.478, 2.583, 16.6, 2.7),
    ("acmix_san19", 20_518_470, 3.130, 3.259, 21.2, 3.4),
]


def on_meta(name: str, **kwargs: Any) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("name", "plain", "acmix"), [(row[0], row[1], row[4]) for row in PUBLISHED])
def test_parameters_are_those_of_the_paper(name, plain, acmix):
    assert parameters(on_meta(name, block="plain")) == parameters(on_meta(name, mix="attention")) == plain
    assert parameters(on_meta(name)) == pytest.approx(acmix * 1e6, rel=0.03)


@pytest.mark.parametrize(
    ("name", "products", "counted", "figure"),
    [
        pytest.param(name, products, counted, figure, marks=() if name == "acmix_san10" else pytest.mark.slow)
        for name, _, products, counted, _, figure in PUBLISHED
    ],
)
def test_multiply_adds_and_the_count_of_sans_authors_are_the_published_ones(name, products, counted, figure):
    image = torch.zeros(1, 3, 224, 224, device="meta")
    san, ours, folded = on_meta(name, block="plain"), on_meta(name), on_meta(name, shift="full")
    assert count_multiply_adds(san, image) == pytest.approx(products * 1e9, abs=0.0005e9)
    assert count_like_san(san, image) == pytest.approx(counted * 1e9, abs=0.0005e9)
    # as folded for inference; in training both steps of the convolution path are taken, and 1.9 stands for up to 1.95
    assert count_like_san(folded, image) == pytest.approx(figure * 1e9, rel=0.03)
    assert count_like_san(ours, image) < 1.03 * (figure + 0.05) * 1e9


def test_the_counters_leave_no_hook_behind_and_agree_for_either_implementation():
    counts = set()
    for impl in ("auto", "reference"):
        model = timm.create_model("acmix_san10", **SMALL, impl=impl)
        counts.add(count_like_san(model, torch.zeros(1, 3, 32, 32)))
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert len(counts) == 1


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
@pytest.mark.parametrize("size", [(1, 1), (40, 24), (33, 97)], ids=str)
def test_images_of_any_size_and_aspect_ratio_are_taken(stem, size):
    model = timm.create_model("acmix_san10", **{**SMALL, "stem": stem, "num_classes": 5}).eval()
    with torch.no_grad():
        assert model(torch.randn(2, 3, *size)).isfinite().all()
        assert model.forward_intermediates(torch.randn(2, 3, *size))[1][0].shape[2:] == size


def test_the_cifar_stem_ends_in_4_by_4_and_the_imagenet_stem_in_a_thirtysecond():
    for stem, size in (("cifar", (4, 4)), ("imagenet", (1, 1))):
        model = timm.create_model("acmix_san10", **{**SMALL, "stem": stem}).eval()
        assert model.forward_features(torch.zeros(1, 3, 32, 32)).shape[2:] == size
        assert model.feature_info[-1]["reduction"] == 32 // size[0]


def test_a_fused_network_gives_the_same():
    torch.manual_seed(0)
    model = timm.create_model("acmix_san10", **SMALL, num_classes=5).double()
    x = torch.randn(4, 3, 32, 32).double()
    with torch.no_grad():
        model(x)  # moves the running statistics
        torch.testing.assert_close(fuse(model)(x), model.eval()(x))
    assert {module.convolution.kind for module in fuse(model).modules() if isinstance(module, ACmix)} == {"full"}


def test_a_graph_of_fx_gives_the_same_for_other_sizes():
    model = timm.create_model("acmix_san10", **SMALL, num_classes=5).eval()
    graph = torch.fx.symbolic_trace(model)
    for size in ((32, 32), (12, 20)):
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(graph(x), model(x))


def test_a_whole_module_is_saved_and_loaded():
    model = timm.create_model("acmix_san10", **SMALL, num_classes=5).eval()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(again(x), model(x))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"base_width": 24}, "multiple of 16"),
        ({"stem": "swin"}, "unknown stem 'swin'"),
        ({"block": "san"}, "unknown block 'san'"),
        ({"layers": (1, 1, 1, 1)}, "need 5 numbers"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("acmix_san10", **kwargs)
