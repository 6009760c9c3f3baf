"""The block and small networks in low precision, other layouts, copied, stored, on the meta device and traced."""

import copy
import io
from collections.abc import Iterator

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.fx import symbolic_trace
from torchvision.models.feature_extraction import create_feature_extractor

from acmix import ACmix, fuse, models  # noqa: F401 - registers the networks

LOW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
LAYERS = 16  # roundings in a row, between input and output: at most four for each of some four blocks in depth


def resnet() -> nn.Module:
    return timm.create_model("acmix_resnet26", num_classes=5, base_width=8, stem="cifar")


def swin() -> nn.Module:
    return timm.create_model(
        "acmix_swin_tiny", num_classes=5, embed_dim=8, depths=(1, 2, 1, 1), heads=(1, 2, 2, 4),
        img_size=(32, 24), patch_size=2, window_size=4,
    )  # fmt: skip


CASES = {
    "block": (lambda: ACmix(16, 16, heads=2), (16, 6, 9)),
    "resnet": (resnet, (3, 32, 24)),
    "swin": (swin, (3, 32, 24)),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, Tensor]:
    """A network in evaluation mode, its input, its output."""
    torch.manual_seed(0)
    build, shape = CASES[request.param]
    model, x = build().eval(), torch.randn(2, *shape)
    with torch.no_grad():
        return model, x, model(x)


@pytest.fixture(scope="module", autouse=True)
def nothing_compiled() -> Iterator[None]:
    """The C++ for each type, which other tests hold to the reference, takes longer to compile than all of these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACMIX_COMPILE", "never")
        yield


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.detach().float() - want).norm() / want.norm())


def stored(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def assert_trains(model: nn.Module, x: Tensor) -> None:
    model.train()(x).float().square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@LOW
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_network_in_half_precision_infers_and_trains(case, dtype, layout):
    model, x, want = case
    half = copy.deepcopy(model).half() if dtype is torch.float16 else copy.deepcopy(model).to(dtype)
    half, x = half.to(memory_format=layout), x.to(dtype).contiguous(memory_format=layout)
    with torch.inference_mode():
        got = half(x)
    assert got.dtype == dtype
    assert relative(got, want) < LAYERS * torch.finfo(dtype).eps
    assert_trains(half, x)


@LOW
def test_a_network_infers_and_trains_under_autocast(case, dtype):
    model, x, want = case
    with torch.autocast("cpu", dtype):
        with torch.inference_mode():
            assert relative(model(x), want) < LAYERS * torch.finfo(dtype).eps
        trained = copy.deepcopy(model).train()
        out = trained(x)
    out.float().square().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in trained.parameters())


def test_a_network_stored_whole_or_copied_gives_the_same(case):
    model, x, want = case
    for same in (stored(model), copy.deepcopy(model), stored(copy.deepcopy(model))):
        with torch.no_grad():
            torch.testing.assert_close(same(x), want, rtol=0, atol=0)
    assert relative(stored(fuse(model))(x), want) < 1e-5


def test_a_network_on_the_meta_device_gives_shapes_and_gradients(case):
    model, x, want = case
    on_meta, x = copy.deepcopy(model).to("meta"), x.to("meta")
    assert on_meta(x).shape == want.shape
    on_meta.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in on_meta.parameters())


def test_a_graph_of_fx_gives_the_same_trains_and_is_stored(case):
    model, x, want = case
    graph = symbolic_trace(copy.deepcopy(model))
    torch.testing.assert_close(graph(x), want)
    torch.testing.assert_close(stored(graph)(x), want)
    smaller = x[:1, :, :-2, :-3]
    torch.testing.assert_close(graph(smaller), model(smaller))
    assert_trains(symbolic_trace(copy.deepcopy(model).train()), x)


def test_a_graph_of_fx_holds_every_path_as_a_node():
    paths = ["layer1.0.acmix.attention", "layer4.0.acmix.convolution"]
    maps = create_feature_extractor(resnet().eval(), paths)(torch.randn(1, 3, 32, 24))
    assert [maps[path].shape for path in paths] == [(1, 8, 32, 24), (1, 64, 4, 3)]


@pytest.mark.parametrize("name", ["acmix_resnet26", "acmix_swin_tiny"])
def test_timm_builds_a_network_on_a_device_in_a_dtype(name):
    model = timm.create_model(name, device="meta", dtype=torch.bfloat16)
    assert {(t.device.type, t.dtype) for t in model.parameters()} == {("meta", torch.bfloat16)}
    model.eval().reset_classifier(3)
    assert (model.get_classifier().weight.dtype, model.get_classifier().training) == (torch.bfloat16, False)
