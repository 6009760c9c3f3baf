"""acmix.fuse: the same logits from fewer operations, and nothing folded that may not be."""

import copy

import pytest
import timm
import torch
from torch import nn

from acmix import ACmix, fuse, models  # noqa: F401 - registers the networks
from acmix.layers import ShiftConv

RESNET = {"base_width": 8, "stem": "cifar", "kernel_att": 3}
SWIN = {"embed_dim": 12, "heads": (1, 2, 3, 6), "img_size": 32, "patch_size": 2, "window_size": 4}
NETWORKS = pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("acmix_resnet26", RESNET),
        ("acmix_resnet26", {**RESNET, "block": "plain"}),
        ("acmix_resnet26", {**RESNET, "shift": "full", "mix": "convex", "heads": 2}),
        ("acmix_resnet26", {**RESNET, "shift": "shift", "mix": "convolution", "heads": (1, 2, 4, 8)}),
        ("acmix_resnet26", {**RESNET, "shift": "fixed", "features_only": True}),
        ("acmix_resnet26", {**RESNET, "shift": "fixed", "mix": {"per": "head"}, "heads": (1, 2, 4, 8)}),
        ("acmix_swin_tiny", SWIN),
        ("acmix_swin_tiny", {**SWIN, "mix": {"per": "channel", "tied": True}}),
        ("test_resnet", {}),
    ],
)


def trained(name: str, **kwargs) -> nn.Module:
    """A network whose every number differs from its start."""
    torch.manual_seed(0)
    model = timm.create_model(name, **({} if kwargs.get("features_only") else {"num_classes": 5}), **kwargs)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor += 0.1 * torch.rand_like(tensor)
    return model.eval()


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def flat(out: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([part.flatten() for part in out]) if isinstance(out, list) else out


@NETWORKS
@pytest.mark.parametrize("size", [(32, 32), (37, 45)])
def test_a_fused_network_gives_the_same_up_to_rounding(name, kwargs, size):
    model = trained(name, **kwargs)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = images(2, 3, *size)
    with torch.no_grad():
        exact = flat(copy.deepcopy(model).double()(x))
        double, single = flat(fuse(copy.deepcopy(model).double())(x)), flat(fuse(model)(x.float()))
    scale = exact.abs().max().clamp(min=1)
    assert float((double - exact).abs().max() / scale) < 1e-10
    assert float((single - exact).abs().max() / scale) < 1e-5
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_no_norm_stays_but_those_after_a_block_and_no_block_keeps_two_weights():
    fused = fuse(trained("acmix_resnet26", **RESNET).train())
    norms = [name for name, module in fused.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 8
    assert all(name.endswith("bn2") for name in norms)
    assert {module.kind for module in fused.modules() if isinstance(module, ShiftConv)} == {"full"}
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    assert not any(module.training for module in fused.modules())


def test_channels_last_and_bfloat16_networks_are_fused():
    model, x = trained("acmix_resnet26", **RESNET), images(2, 3, 32, 32).float()
    last = fuse(copy.deepcopy(model).to(memory_format=torch.channels_last))
    assert last.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(last(x), model(x), rtol=1e-4, atol=1e-4)
        assert fuse(model.bfloat16())(x.bfloat16()).dtype == torch.bfloat16


def test_a_fused_network_is_copied_compiled_and_exported():
    fused, x = fuse(trained("acmix_resnet26", **RESNET, layers=(1, 1, 1, 1))), images(2, 3, 32, 32).float()
    with torch.no_grad():
        want = fused(x)
        torch.testing.assert_close(copy.deepcopy(fused)(x), want)
        torch.testing.assert_close(torch.compile(fused, backend="aot_eager", fullgraph=True)(x), want)
        torch.testing.assert_close(torch.export.export(fused, (x,)).module()(x), want, rtol=1e-4, atol=1e-4)


class Untouched(nn.Sequential):
    """Of another type: what its forward does with its children is its own affair."""


@pytest.mark.parametrize("reason", ["hook", "type", "shared", "no statistics", "order"])
def test_what_may_not_be_folded_is_left_as_it_is(reason):
    conv, norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3, track_running_stats=reason != "no statistics")
    parts = [norm, conv] if reason == "order" else [conv, norm]
    model = (Untouched if reason == "type" else nn.Sequential)(*parts)
    if reason == "hook":
        conv.register_forward_hook(lambda module, inputs, out: 2 * out)
    if reason == "shared":
        model.append(conv)
    x = images(2, 3, 9, 9).float()
    fused = fuse(model)
    assert [type(part) for part in fused.modules()] == [type(part) for part in model.modules()]
    assert torch.equal(fused(x), model.eval()(x))


def test_a_block_whose_path_has_a_hook_or_a_bias_keeps_it():
    block = ACmix(8, 8, heads=2, kernel_att=3)
    block.convolution.register_forward_hook(lambda module, inputs, out: 2 * out)
    biased = ACmix(8, 8, heads=2, kernel_att=3, conv_bias=True)
    for kept in (block, biased):
        assert fuse(kept).convolution.kind == "learned"
