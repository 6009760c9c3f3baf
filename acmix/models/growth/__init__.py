"""Start from what is trained: the weights of a plain network in an ACmix network, whose new path has no weight yet."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from acmix.checkpoint.fit import interpolated_positions
from acmix.checkpoint.state_dict import state_dict_refusal
from acmix.errors import UserError
from acmix.layers import ACmix
from acmix.models.acmix_resnet import ACmixResNet
from acmix.models.growth.fit import classifier_names, our_names, refuse_misfit
from acmix.models.growth.kernels import refuse_unfit
from acmix.models.growth.paths import grow_block, mix_values
from acmix.models.growth.report import Growth, Layer
from acmix.models.growth.residual import CONVOLUTION, Options, approximated, first_weights, grow_bottlenecks


@torch.no_grad()
def grow(
    network: nn.Module,
    state_dict: Mapping[str, Tensor],
    *,
    calibration: Iterable[Tensor] | None = None,
    share: float = 0.0,
    regroup: bool = False,
    on_layer: Callable[[Layer], None] = lambda layer: None,
) -> Growth:
    """Fill an ACmix network with the weights of a plain one, strictly; returns what became of each tensor.

    Where the source has one path of a block, attention or convolution, the network then gives the source's logits: the
    other path keeps the parameters that it has, with a weight of 0, which has a gradient from the first step. Its own
    parameters have none until that weight has moved. A 3×3 convolution of a residual network is approximated by a
    convolution path, with the attention at a weight of 0.

    Args:
        network: A network of ours; its parameters and buffers are overwritten in place, in their dtype.
        state_dict: Weights of a plain network: ours with `mix: attention` or `convolution`, or with `block: plain`, or
            timm's Swin or ResNet of the same layers. A classifier for another number of classes is not taken.
        calibration: For a residual network: a few hundred training images, in batches (B, 3, H, W) as the network sees
            them. The kernels are then fitted, block by block, to what the source's layers give on them, and the
            statistics of the norms follow. None: without images, weighed by what the batch norms say of the inputs.
        share: First weight of the new path; the weight of the one that is there is multiplied by 1 - share.
        regroup: For a residual network: change the order of a convolution's output channels, so that those that share
            directions share a group; the norm and the convolution after it follow.
        on_layer: Called with each approximated block when it is made, which takes its time with a calibration.

    Raises:
        UserError: for what is no state dict; listing every missing and unexpected name and every shape that differs,
            with the likely reason; for a share that is not from 0 to less than 1; for a calibration without images;
            for `regroup` where no convolution is approximated; for a block that cannot hold what the source has; all
            before anything is changed.
    """
    if not 0 <= share < 1:
        raise UserError(f"share: must be from 0 to less than 1, got {share}")
    if refusal := state_dict_refusal(state_dict):
        raise UserError(f"the weights to grow from are no state dict: {refusal}")
    growth = Growth()
    given = our_names(state_dict, growth.dropped)
    _leave_classifier(network, given, growth)
    _fit_positions(network, given, growth)
    convolutions = approximated(network, given)
    values = _plan(network, given, {f"{name}.acmix" for name in convolutions}, share, growth)
    if regroup and not convolutions:
        raise UserError("regroup: no convolution is approximated here, all is taken as it is; leave it out")
    if convolutions and calibration is not None:
        calibration = _images(calibration)
    own = network.state_dict()
    for name, value in values.items():
        own[name].copy_(value)
    if convolutions:
        assert isinstance(network, ACmixResNet)
        training = network.training
        network.eval()
        try:
            for layer in grow_bottlenecks(network, given, calibration, Options(share, regroup)):
                growth.layers.append(layer)
                on_layer(layer)
        finally:
            network.train(training)
    names = list(own)
    growth.new.sort(key=names.index)
    return growth


def _images(calibration: Iterable[Tensor]) -> Iterator[Tensor]:
    """The batches of a calibration; UserError where there are none."""
    batches = iter(calibration)
    for first in batches:
        if len(first):
            return itertools.chain([first], batches)
    raise UserError("calibration: it holds no images; a few hundred are wanted, or None to do without")


def _plan(
    network: nn.Module, given: dict[str, Tensor], from_convolutions: set[str], share: float, growth: Growth
) -> dict[str, Tensor]:
    """The values of everything but the blocks that come from convolutions; UserError where the source does not fit."""
    own = network.state_dict()
    blocks = {name: module for name, module in network.named_modules() if isinstance(module, ACmix)}
    if not blocks:
        raise UserError(f"{type(network).__name__} has no ACmix block to grow a path in; choose one of acmix_*")
    mix_of_stage: dict[int, dict[str, Tensor]] = {}
    offered, needed = dict(given), {name: tuple(value.shape) for name, value in own.items()}
    for name, block in blocks.items():
        inside = {key: needed.pop(key) for key in own if key.startswith(f"{name}.")}
        if name in from_convolutions:
            source = f"{name.removesuffix('acmix')}{CONVOLUTION}"
            refuse_unfit(name, block, given[source])
            mix_values(name, block, *first_weights(block, share))
            width, side = block.out_channels, getattr(block.convolution, "kernel_size", 3)
            needed[source] = (width, block.in_channels, side, side)
            fresh = [key for key, _ in block.named_parameters() if key.startswith(("attention.", "mix."))]
            growth.new += [f"{name}.{key}" for key in fresh]
            continue
        needed |= inside
        theirs = {key[len(name) + 1 :]: offered.pop(key) for key in given if key.startswith(f"{name}.")}
        if mix := {key: value for key, value in theirs.items() if key.startswith("mix.")}:
            first = mix_of_stage.setdefault(block.mix.stage, mix)
            if block.mix.tied and not all(torch.equal(value, first[key]) for key, value in mix.items()):
                raise UserError(
                    f"{name}: mix.tied holds one alpha and beta for stage {block.mix.stage}, but the source's blocks "
                    "differ in theirs; grow into a mix that is not tied"
                )
        if theirs:
            theirs = mix_of_stage.get(block.mix.stage, {}) | theirs  # the blocks of a stage may share their weights
            grown = grow_block(name, block, theirs, share)
            offered |= {f"{name}.{key}": value for key, value in grown.values.items()}
            growth.new += [f"{name}.{key}" for key in grown.new]
            growth.layers.append(Layer(name, share == 0 or not grown.new, grown.text))
    inside_blocks = tuple(f"{name}." for name in blocks)
    absent = {key for key in growth.new if not key.startswith(inside_blocks)}  # a classifier that is drawn anew
    absent |= {key for key in needed if key.endswith("num_batches_tracked") and key not in offered}
    refuse_misfit(network, offered, {key: shape for key, shape in needed.items() if key not in absent})
    growth.copied = sum(key in own and not key.startswith(inside_blocks) for key in offered)
    return {key: value for key, value in offered.items() if key in own}


def _leave_classifier(network: nn.Module, given: dict[str, Tensor], growth: Growth) -> None:
    """Take a classifier for other classes, or none, out of what is given."""
    own, head = network.state_dict(), classifier_names(network)
    if all(name in given and given[name].shape == own[name].shape for name in head):
        return
    theirs = [name for name in head if name in given]
    growth.dropped |= dict.fromkeys(theirs, "a classifier for other classes")
    found = f"one for {len(given.pop(theirs[0]))} classes" if theirs else "none"
    for name in theirs[1:]:
        del given[name]
    growth.new += head
    growth.notes.append(f"the classifier for {len(own[head[0]])} classes is drawn anew; the source has {found}")


def _fit_positions(network: nn.Module, given: dict[str, Tensor], growth: Growth) -> None:
    """Interpolate tables of positions that are for other windows; UserError for one that cannot be."""
    try:
        interpolated = interpolated_positions(network, given)
    except ValueError as error:
        raise UserError(f"tables of positions of the source: {error}") from None
    if interpolated:
        given |= interpolated
        growth.notes.append(f"{len(interpolated)} tables of positions are for another size of image; interpolated")
