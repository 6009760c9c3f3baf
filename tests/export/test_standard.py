"""Networks rewritten in standard operators: the same logits, folded or not, for one size or any."""

import copy

import pytest
import timm
import torch
from torch import nn

from acmix import ACmix, models  # noqa: F401 - registers the networks
from acmix.export.program import trace
from acmix.export.standard import standard
from acmix.export.windows import WindowedAttention
from acmix.ops.implementations import Window
from acmix.ops.reference import local_attention

RESNET = {"base_width": 8, "stem": "cifar", "kernel_att": 3, "layers": (1, 1, 1, 1)}
SAN = {"base_width": 16, "stem": "cifar", "layers": (1, 1, 1, 1, 1)}
PVT = {
    "img_size": 32,
    "embed_dims": (8, 16),
    "depths": (1, 2),
    "heads": (1, 2),
    "reductions": (2, 1),
    "mlp_ratios": (2, 2),
}
SWIN = {"embed_dim": 12, "heads": (1, 6), "depths": (2, 2), "img_size": 32, "patch_size": 4, "window_size": 3}


def network(name: str, **kwargs) -> nn.Module:
    """A network whose every number differs from its start."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **kwargs)
    with torch.no_grad():
        for parameter in model.state_dict().values():
            if parameter.is_floating_point():
                parameter += 0.1 * torch.rand_like(parameter)
    return model.eval()


def difference(model: nn.Module, images: torch.Tensor, **options: bool) -> float:
    """Largest difference of the rewritten network from the network, relative to the largest logit, in float64."""
    model, images = copy.deepcopy(model).double(), images.double()
    with torch.no_grad():
        want = model(images)
        return float((standard(model, images, **options)(images) - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("acmix_resnet26", {**RESNET, "kernel_att": 7}),
        ("acmix_resnet26", {**RESNET, "mix": "convex", "heads": 2, "shift": "full"}),
        ("acmix_resnet26", {**RESNET, "mix": "attention"}),
        ("acmix_resnet26", {**RESNET, "mix": "convolution", "heads": (1, 2, 4, 8)}),
        ("acmix_resnet26", {**RESNET, "shift": "shift"}),
        ("acmix_resnet26", {**RESNET, "mix": {"per": "channel"}}),
        ("acmix_resnet26", {**RESNET, "mix": {"per": "head", "tied": True}, "heads": (1, 2, 4, 8)}),
        ("acmix_resnet26", {**RESNET, "mix": {"mode": "fixed", "alpha": 0.3, "beta": 2}}),
        ("acmix_san10", SAN),
        ("acmix_pvt_tiny", PVT),
        ("acmix_pvt_tiny", {**PVT, "mix": "convolution"}),
        ("acmix_swin_tiny", SWIN),
        ("acmix_swin_tiny", {**SWIN, "mix": {"per": "head"}}),
        ("acmix_swin_tiny", {**SWIN, "mix": "attention"}),
        ("acmix_swin_tiny", {**SWIN, "mix": "convolution"}),
        ("acmix_swin_tiny", {**SWIN, "shift": "full"}),
    ],
)
def test_a_rewritten_network_gives_the_same(name, kwargs, fold):
    model = network(name, **kwargs)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    # maps of few pixels hold logarithms of small counts in float32
    assert difference(model, images, fold=fold) < 1e-6
    if "resnet" in name:
        assert difference(model, images[..., :27], fold=fold, any_size=True) < 1e-10
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_nothing_of_a_block_stays_but_what_the_image_meets():
    folded = standard(network("acmix_resnet26", **RESNET), torch.zeros(1, 3, 32, 32))
    assert not any(isinstance(module, (ACmix, nn.BatchNorm2d)) for module in folded.modules())
    assert not any(parameter.requires_grad for parameter in folded.parameters())


def test_a_norm_that_drops_channels_is_folded_without_dividing_by_zero():
    model = network("acmix_resnet26", **RESNET)
    with torch.no_grad():
        model.layer1[0].bn2.weight[3] = 0
        model.layer2[0].acmix.mix.alpha.zero_()
    images = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    assert difference(model, images) < 1e-6


@pytest.mark.parametrize("size", [(29, 31), (5, 40), (8, 8), (23, 16)])
@pytest.mark.parametrize("window", [Window(7, 1, 1), Window(3, 2, 1), Window(5, 1, 2), Window(5, 2, 2)])
@pytest.mark.parametrize("any_size", [True, False])
def test_windows_are_those_of_the_reference(window, size, any_size):
    if window.reach >= min(size):
        pytest.skip("the reference wants a larger map")
    heads, width = 2, 3
    q, k, v = torch.randn(3, 2, heads * width, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    split = [maps.unflatten(1, (heads, width)).flatten(3).mT for maps in (q * width**-0.5, k, v)]
    out = WindowedAttention(window, None if any_size else size).double()(*split, *size)
    want = local_attention(q, k, v, q.new_zeros(width, 2), window.kernel_size, window.stride, window.dilation)
    # dense windows hold logarithms of small counts in float32
    torch.testing.assert_close(out.mT.flatten(1, 2), want.flatten(2), rtol=1e-6, atol=1e-6)


def test_a_graph_for_any_size_holds_pytorchs_own_operations_only_and_takes_other_sizes():
    model = network("acmix_resnet26", **RESNET)
    images = torch.randn(3, 3, 24, 28, generator=torch.Generator().manual_seed(1))
    program = trace(standard(model, images, any_size=True), images[:2], any_size=True)
    functions = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert not [name for name in functions if "acmix" in name]
    with torch.no_grad():
        for given in (images, images[:1, :, :17], images[:1].repeat(1, 1, 2, 1)):
            want = model(given)
            torch.testing.assert_close(program.module()(given), want, rtol=1e-5, atol=1e-5 * want.abs().max().item())
