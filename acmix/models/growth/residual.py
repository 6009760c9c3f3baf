"""Plain residual networks grown into ACmix-ResNets: every 3×3 convolution becomes an ACmix block."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from acmix.layers import ACmix
from acmix.models.acmix_resnet import ACmixResNet, Bottleneck
from acmix.models.growth.calibrate import explained, fit_kernels, second_moments, shift_statistics
from acmix.models.growth.kernels import (
    factorise,
    moments_from_norm,
    output_scale,
    rank,
    share_groups,
    write,
)
from acmix.models.growth.paths import mix_values
from acmix.models.growth.report import Layer

CONVOLUTION = "conv2.weight"


@dataclass(frozen=True)
class Options:
    """share: first share of the attention. regroup: whether output channels may change groups."""

    share: float
    regroup: bool


def first_weights(block: ACmix, share: float) -> tuple[float, float]:
    """alpha and beta of a block made from a convolution."""
    return share if block.attention is not None else 0.0, 1 - share


def approximated(network: nn.Module, given: Mapping[str, Tensor]) -> dict[str, Bottleneck]:
    """The bottlenecks, by name, whose block has to be made from a convolution that the source has there."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, Bottleneck) and module.acmix is not None and f"{name}.{CONVOLUTION}" in given
    }


@torch.no_grad()
def grow_bottlenecks(
    network: ACmixResNet, given: Mapping[str, Tensor], calibration: Iterable[Tensor] | None, options: Options
) -> Iterator[Layer]:
    """Make the blocks of a network, which holds the source's other tensors already, one by one.

    Args:
        network: The network, in evaluation mode.
        given: The source's tensors, the weights of all its 3×3 convolutions among them.
        calibration: Batches of images (B, 3, H, W), or None.
        options: How.
    """
    twin = _plain_twin(network, given)
    now: list[Tensor] | None = None
    if calibration is not None:
        like = network.conv1.weight
        now = [network.maxpool(network._stem(images.to(like))) for images in calibration]
    before = None if now is None else list(now)
    for name, block in approximated(network, given).items():
        plain = twin.get_submodule(name)
        assert isinstance(plain, Bottleneck)
        yield _grow(name, block, plain, options, before, now)


def _plain_twin(network: ACmixResNet, given: Mapping[str, Tensor]) -> ACmixResNet:
    """The network that the weights are of: ordinary convolutions where ours has blocks."""
    twin = copy.deepcopy(network)
    for name, block in approximated(twin, given).items():
        weight = given[f"{name}.{CONVOLUTION}"].to(network.conv1.weight)
        assert block.acmix is not None
        channels, side = weight.shape[0], weight.shape[2]
        block.conv2 = nn.Conv2d(channels, channels, side, block.acmix.stride, side // 2, bias=False)
        block.conv2.weight = nn.Parameter(weight)
        block.acmix = None
    return twin.eval()


def _grow(
    name: str,
    block: Bottleneck,
    plain: Bottleneck,
    options: Options,
    before: list[Tensor] | None,
    now: list[Tensor] | None,
) -> Layer:
    """Make one block; `before` and `now`, its input in the source and here, are replaced by its output."""
    acmix, conv = block.acmix, plain.conv2
    assert acmix is not None
    assert conv is not None
    if before is not None and now is not None:
        shift_statistics(block.bn1, map(plain.conv1, before), map(block.conv1, now))
        moments = second_moments(_before_the_block(block, now))
    else:
        moments = moments_from_norm(plain.bn1)
    scale, most = output_scale(plain.bn2), rank(acmix)
    order = torch.arange(len(scale), device=scale.device)
    if options.regroup:
        order = share_groups(conv.weight, moments, scale, acmix.heads, most)
        _reorder(block, order)
    factors = factorise(conv.weight[order], moments, scale[order], acmix.heads, most)
    if before is not None and now is not None:
        outputs = (conv(x)[:, order] for x in _before_the_block(plain, before))
        factors = fit_kernels(acmix, factors, _before_the_block(block, now), outputs)
    write(acmix, factors)
    weights = mix_values(f"{name}.acmix", acmix, *first_weights(acmix, options.share))
    acmix.load_state_dict({**acmix.state_dict(), **weights})
    fit = None
    if before is not None and now is not None:
        fit = _go_on(block, plain, order, scale[order], before, now)
    text = f"a 3×3 convolution by kernels of rank {most}"
    text += ", its channels regrouped" if options.regroup else ""
    if acmix.attention is not None:
        text += f"; attention is new, alpha {options.share:.4g}, beta {1 - options.share:.4g}"
    return Layer(f"{name}.acmix", False, text, factors.energy, fit)


def _before_the_block(block: Bottleneck, maps: Iterable[Tensor]) -> Iterator[Tensor]:
    return (block.act(block.bn1(block.conv1(x))) for x in maps)


def _reorder(block: Bottleneck, order: Tensor) -> None:
    """Let the block's output have its channels in another order: the norm and the convolution after it follow."""
    norm = block.bn2
    assert norm.running_mean is not None
    assert norm.running_var is not None
    for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        values.copy_(values[order].clone())
    block.conv3.weight.copy_(block.conv3.weight[:, order].clone())


def _go_on(
    block: Bottleneck, plain: Bottleneck, order: Tensor, scale: Tensor, before: list[Tensor], now: list[Tensor]
) -> float:
    """Statistics of the norms after the block, and the maps after it; returns how well the block fits."""
    acmix, conv = block.acmix, plain.conv2
    assert acmix is not None
    assert conv is not None

    def outputs() -> Iterator[Tensor]:
        return (conv(x)[:, order] for x in _before_the_block(plain, before))

    def given() -> Iterator[Tensor]:
        return map(acmix, _before_the_block(block, now))

    fit = explained(outputs(), given(), scale)
    shift_statistics(block.bn2, outputs(), given())
    plain_branch = (plain.conv3(plain.act(plain.bn2(conv(x)))) for x in _before_the_block(plain, before))
    branch = (block.conv3(block.act(block.bn2(x))) for x in given())
    shift_statistics(block.bn3, plain_branch, branch)
    if isinstance(block.downsample, nn.Sequential) and isinstance(plain.downsample, nn.Sequential):
        shift_statistics(block.downsample[1], map(plain.downsample[0], before), map(block.downsample[0], now))
    for index, (x, y) in enumerate(zip(before, now, strict=True)):
        before[index], now[index] = plain(x), block(y)
    return fit
