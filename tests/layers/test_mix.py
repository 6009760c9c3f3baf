"""The path weights and the ablation modes."""

import copy

import pytest
import torch

from acmix import ACmix, models
from acmix.layers import PathMix, path_weights, tie_path_weights
from acmix.telemetry.probes.paths import path_layers


@pytest.mark.parametrize(
    ("mode", "parameters", "weights"),
    [
        ("attention", [], (1.0, 0.0)),
        ("convolution", [], (0.0, 1.0)),
        ("sum", [], (1.0, 1.0)),
        ("convex", ["alpha"], (0.3, 0.7)),
        ("learned", ["alpha", "beta"], (0.3, 0.6)),
    ],
)
def test_each_mode_has_its_weights_and_only_the_parameters_it_learns(mode, parameters, weights):
    mix = PathMix(mode)
    assert [name for name, _ in mix.named_parameters()] == parameters
    for parameter, value in zip(mix.parameters(), (0.3, 0.6), strict=False):
        parameter.data.fill_(value)
    assert [float(torch.as_tensor(weight).detach()) for weight in mix.weights()] == pytest.approx(weights)


def test_learned_weights_start_at_one_half():
    mix = PathMix()
    assert (float(mix.alpha), float(mix.beta)) == (0.5, 0.5)


def test_mixing_weighs_attention_by_alpha_and_convolution_by_beta():
    mix = PathMix()
    mix.alpha.data.fill_(2.0)
    mix.beta.data.fill_(3.0)
    assert mix(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])).tolist() == [2.0, 3.0]


def test_an_unknown_mode_is_refused_with_the_modes_there_are():
    with pytest.raises(ValueError, match=r"'blend'.*attention, convolution, sum, convex, learned"):
        PathMix("blend")


def test_fixed_weights_are_numbers_and_no_parameters():
    mix = PathMix("fixed", alpha=0.75)
    assert mix.weights() == (0.75, 0.5)
    assert not list(mix.parameters())


@pytest.mark.parametrize("mode", ["learned", "convex"])
@pytest.mark.parametrize("per", ["head", "channel"])
@pytest.mark.parametrize("conv_bias", [False, True])
def test_each_head_or_channel_is_weighed_by_its_own_weights(mode, per, conv_bias):
    torch.manual_seed(0)
    options = {"heads": 2, "kernel_att": 3, "conv_bias": conv_bias}
    block = ACmix(8, 8, mix={"mode": mode, "per": per}, **options).double()
    weights = [0.3 + torch.rand_like(weight) for weight in block.mix.parameters()]
    with torch.no_grad():
        for weight, value in zip(block.mix.parameters(), weights, strict=True):
            weight.copy_(value)
    alpha, beta = weights if mode == "learned" else (weights[0], 1 - weights[0])
    assert alpha.shape == {"head": (2,), "channel": (8,)}[per]
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    maps = torch.nn.functional.conv2d(x, block.qkv.weight[:, :, None, None], block.qkv.bias).chunk(3, 1)
    attention, convolution = block.attention(*maps), block.convolution(*maps)
    wanted = torch.empty_like(attention)
    for channel in range(8):
        own = channel // 4 if per == "head" else channel
        wanted[:, channel] = alpha[own] * attention[:, channel] + beta[own] * convolution[:, channel]
    out = block(x)
    torch.testing.assert_close(out, wanted)
    out.square().sum().backward()
    assert all(weight.grad.abs().min() > 0 for weight in block.mix.parameters())
    (row,) = path_layers(block)
    assert (row["alpha"], row["beta"]) == pytest.approx((float(alpha.mean()), float(beta.mean())))


@pytest.mark.parametrize("per", ["head", "channel"])
def test_equal_weights_everywhere_are_the_papers_scalars(per):
    torch.manual_seed(0)
    scalar, x = ACmix(8, 8, heads=2, kernel_att=3), torch.randn(2, 8, 6, 6)
    torch.manual_seed(0)
    block = ACmix(8, 8, heads=2, kernel_att=3, mix={"per": per})
    torch.testing.assert_close(block(x), scalar(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert block(x).dtype == scalar(x).dtype == torch.bfloat16


class Stages(torch.nn.Sequential):
    """Two blocks in stage 1 and two in stage 2, tied."""

    def __init__(self, **mix):
        super().__init__(
            *(ACmix(4, 4, heads=2, kernel_att=3, stage=n, mix={"tied": True, **mix}) for n in (1, 1, 2, 2))
        )
        tie_path_weights(self)


@pytest.mark.parametrize("per", ["block", "head"])
def test_tied_blocks_of_a_stage_share_the_weights_of_the_first(per):
    network = Stages(per=per)
    assert [name for name in network.state_dict() if "mix" in name] == [
        "0.mix.alpha", "0.mix.beta", "2.mix.alpha", "2.mix.beta",
    ]  # fmt: skip
    twin = copy.deepcopy(network)
    torch.nn.init.constant_(network[0].mix.alpha, 0.8)
    assert [row["alpha"] for row in path_layers(network)] == pytest.approx([0.8, 0.8, 0.5, 0.5])
    assert [row["alpha"] for row in path_layers(twin)] == pytest.approx([0.5] * 4)
    x = torch.randn(1, 4, 5, 5)
    twin.load_state_dict(network.state_dict())
    torch.testing.assert_close(twin(x), network(x), rtol=0, atol=0)
    alone = torch.autograd.grad(network[0](x).sum(), network[0].mix.alpha)[0]
    both = torch.autograd.grad(network[0](x).sum() + network[1](x).sum(), network[0].mix.alpha)[0]
    assert not torch.equal(alone, both)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("acmix_resnet26", {"stem": "cifar", "base_width": 8}),
        ("acmix_swin_tiny", {"img_size": 32, "window_size": 4, "embed_dim": 24}),
    ],
)
def test_the_networks_tie_their_stages(name, arguments):
    with torch.device("meta"):
        network = models.create_model(name, 10, mix={"tied": True, "per": "head"}, **arguments)
        assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    blocks = [module for module in network.modules() if isinstance(module, ACmix)]
    stages = {block.mix.stage for block in blocks}
    assert len(path_weights(network)) == 2 * len(stages) < 2 * len(blocks)
    assert set(path_weights(network)) <= dict(network.named_parameters()).keys()


def test_a_network_that_does_not_tie_its_tied_blocks_is_told():
    with pytest.raises(RuntimeError, match=r"must call acmix\.layers\.tie_path_weights"):
        ACmix(4, 4, heads=2, kernel_att=3, mix={"tied": True})(torch.randn(1, 4, 5, 5))


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ({"per": "pixel"}, "unknown mix.per 'pixel': choose one of block, head, channel"),
        ({"pre": "head"}, "mix.pre: unknown key; nearest: per"),
        ({"mode": "sum", "alpha": 0.5}, "mix.alpha: has no effect with the mode sum"),
        ({"mode": "convex", "beta": 0.5}, "mix.beta: has no effect with the mode convex"),
        ({"mode": "fixed", "per": "head"}, "mix.per: has no effect with the mode fixed"),
        ({"alpha": "half"}, "mix.alpha: must be a finite number"),
        ({"beta": float("nan")}, "mix.beta: must be a finite number, got nan"),
        ({"tied": "yes"}, "mix.tied: must be true or false"),
    ],
)
def test_a_policy_that_cannot_be_is_refused(mix, message):
    with pytest.raises(ValueError, match=message):
        ACmix(8, 8, heads=2, mix=mix)
