"""A trained network made ready for inference."""

import copy
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn

from acmix.layers.block import ACmix
from acmix.layers.convolution import ShiftConv
from acmix.layers.plain import is_plain
from acmix.ops.shift_conv import fold
from acmix.ops.shift_conv.implementations import MAX_FOLDED_HEADS

Network = TypeVar("Network", bound=nn.Module)


def fuse(model: Network) -> Network:
    """A copy of a network for inference, in which what training would still change is computed once and for all.

    A batch norm goes into the convolution before it: inside nn.Sequential, and where the class of a module names the
    two in `conv_norms`, pairs of attribute names; a pair says that nothing but the norm reads the convolution's output.
    The convolution path of a block gets one weight in place of two, up to the number of heads where that is the faster.
    Everything else stays as it is, and so does what is of another type, wrapped, quantised, shared or has hooks.

    Args:
        model: A network, or any module; it is not changed.

    Returns:
        The copy, in evaluation mode, with parameters that take no gradient. It gives what the network gives in
        evaluation mode, up to rounding. It is not to be trained, and its state dict is its own: save the network's.
    """
    fused = copy.deepcopy(model).eval().requires_grad_(False)
    modules = list(fused.modules())
    uses = Counter(id(child) for module in modules for child in module._modules.values())
    for module in modules:
        for conv_name, norm_name in _pairs(module):
            conv, norm = module._modules.get(conv_name), module._modules.get(norm_name)
            if uses[id(conv)] == uses[id(norm)] == 1 and _can_absorb(conv, norm):
                _absorb(conv, norm)  # type: ignore[arg-type]
                module._modules[norm_name] = nn.Identity().eval()
        if isinstance(module, ACmix) and isinstance(module.convolution, nn.Module) and _can_fold(module.convolution):
            module.convolution = _folded(module.convolution)
    return fused


def _pairs(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Names of children of which the second reads all that the first gives, and nothing else does."""
    if "forward" in module.__dict__:
        return
    yield from pairwise(module._modules) if type(module) is nn.Sequential else getattr(type(module), "conv_norms", ())


def _can_absorb(conv: nn.Module | None, norm: nn.Module | None) -> bool:
    if conv is None or norm is None or not (is_plain(conv, nn.Conv2d) and is_plain(norm, nn.BatchNorm2d)):
        return False
    return norm.running_mean is not None  # without running statistics it depends on the batch


def _absorb(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Make `conv` give what `norm` gives after it in evaluation mode."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (_exact(norm.running_var) + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * _exact(norm.weight)
    bias = -_exact(norm.running_mean) if conv.bias is None else _exact(conv.bias) - _exact(norm.running_mean)
    bias = bias * scale + (_exact(norm.bias) if norm.affine else 0.0)
    weight = _exact(conv.weight) * scale[:, None, None, None]
    conv.weight, conv.bias = _constant(weight, conv.weight), _constant(bias, conv.weight)


def _can_fold(convolution: nn.Module) -> bool:
    if not is_plain(convolution, ShiftConv) or convolution.kind not in ("fixed", "random", "learned"):
        return False
    # the bias of the fully connected layer has no place in one weight: it is no constant near the border
    return convolution.fc_bias is None and convolution.heads <= MAX_FOLDED_HEADS  # type: ignore[operator]


def _folded(convolution: ShiftConv) -> ShiftConv:
    """The path of kind `full` that gives the same."""
    weight = fold(_exact(convolution.fc_weight), _exact(convolution.shift_weight))
    with torch.device("meta"):
        folded = ShiftConv(
            convolution.heads,
            convolution.head_dim,
            convolution.kernel_size,
            convolution.stride,
            convolution.dilation,
            in_maps=convolution.in_maps,
            kind="full",
            impl=convolution.impl,
        )
    folded.weight = _constant(weight, convolution.fc_weight)
    return folded.eval()


def _exact(tensor: Tensor) -> Tensor:
    """In float64, so that folding adds one rounding; on the CPU, since not every device has float64."""
    return tensor.detach().to("cpu", torch.float64)


def _constant(values: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(values.to(like), requires_grad=False)
