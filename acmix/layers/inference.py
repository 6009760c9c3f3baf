"""A trained network made ready for inference."""

import copy
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from acmix.layers.attention import AttentionPath
from acmix.layers.block import ACmix
from acmix.layers.convolution import ShiftConv
from acmix.layers.mix import PathMix
from acmix.layers.plain import is_observed, is_plain
from acmix.ops.shift_conv import fold
from acmix.ops.shift_conv.implementations import MAX_FOLDED_HEADS

Network = TypeVar("Network", bound=nn.Module)


def fuse(model: Network) -> Network:
    """A copy of a network for inference, in which what training would still change is computed once and for all.

    A batch norm goes into the convolution before it: inside nn.Sequential, and where the class of a module names the
    two in `conv_norms`, pairs of attribute names; a pair says that nothing but the norm reads the convolution's output.
    The convolution path of a block gets one weight in place of two, up to the number of heads where that is the faster.
    beta goes into the weights of the convolution path, alpha into the projection after the attention, where it has one.
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
        for conv_name, norm_name in conv_norm_pairs(module):
            conv, norm = module._modules.get(conv_name), module._modules.get(norm_name)
            if uses[id(conv)] == uses[id(norm)] == 1 and _can_absorb(conv, norm):
                _absorb(conv, norm)  # type: ignore[arg-type]
                module._modules[norm_name] = nn.Identity().eval()
        if isinstance(module, ACmix):
            _fuse_block(module, uses)
    return fused


def conv_norm_pairs(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Names of children of which the second reads all that the first gives, and nothing else does."""
    if "forward" in module.__dict__:
        return
    yield from pairwise(module._modules) if type(module) is nn.Sequential else getattr(type(module), "conv_norms", ())


def _can_absorb(conv: nn.Module | None, norm: nn.Module | None) -> bool:
    return conv is not None and is_plain(conv, nn.Conv2d) and is_constant_norm(norm)


def is_constant_norm(norm: nn.Module | None) -> bool:
    """Whether a module is a batch norm that in evaluation mode scales and shifts every channel by constants."""
    # without running statistics it depends on the batch
    return norm is not None and is_plain(norm, nn.BatchNorm2d) and norm.running_mean is not None


def _absorb(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Make `conv` give what `norm` gives after it in evaluation mode."""
    scale, shift = norm_constants(norm)
    bias = shift if conv.bias is None else exact(conv.bias) * scale + shift
    weight = exact(conv.weight) * scale[:, None, None, None]
    conv.weight, conv.bias = constant(weight, conv.weight), constant(bias, conv.weight)


def norm_constants(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift of every channel by a batch norm in evaluation mode, each (C,), float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (exact(norm.running_var) + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * exact(norm.weight)
    shift = -exact(norm.running_mean) * scale
    return scale, shift + exact(norm.bias) if norm.affine else shift


def _fuse_block(block: ACmix, uses: Counter[int]) -> None:
    """Fold the path weights into the paths, and the convolution path into one weight."""
    if not is_plain(block.mix, PathMix) or uses[id(block.mix)] != 1:
        return
    alpha, beta = (exact(torch.as_tensor(weight)) for weight in block.mix.weights())
    if isinstance(block.convolution, nn.Module) and _can_fold(block.convolution):
        block.convolution, beta = _folded(block.convolution, beta), torch.ones(())
    elif _owns_weights(block.convolution, ShiftConv, uses):
        _scale(block.convolution, ("weight", "fc_weight", "fc_bias"), beta)
        beta = torch.ones(())
    attention = block.attention
    if isinstance(attention, AttentionPath) and type(attention).finish is AttentionPath.finish:
        projects = not is_observed(attention) and uses[id(attention)] == 1
        if projects and _owns_weights(attention.proj, nn.Linear, uses):
            _scale(attention.proj, ("weight", "bias"), alpha)
            alpha = torch.ones(())
    block.mix = _fixed_mix(block.mix, alpha, beta)


def _owns_weights(module: nn.Module | None, kind: type[nn.Module], uses: Counter[int]) -> TypeGuard[nn.Module]:
    return module is not None and is_plain(module, kind) and uses[id(module)] == 1


def _scale(module: nn.Module, names: tuple[str, ...], factor: Tensor) -> None:
    """Multiply parameters, of those names that the module has."""
    for name in names:
        parameter = module._parameters.get(name)
        if parameter is not None:
            setattr(module, name, constant(exact(parameter) * factor, parameter))


def _fixed_mix(mix: PathMix, alpha: Tensor, beta: Tensor) -> PathMix:
    """A mix with these weights, that of two paths or of the one that `mix` has."""
    if not (mix.has_attention and mix.has_convolution):
        return mix
    if alpha == beta == 1:
        return PathMix("sum", mix.stage).eval()
    fixed = PathMix("learned", mix.stage)
    like = next(mix.parameters(), torch.ones(()))
    fixed.alpha, fixed.beta = constant(alpha, like), constant(beta, like)
    return fixed.eval()


def _can_fold(convolution: nn.Module) -> bool:
    if not is_plain(convolution, ShiftConv) or convolution.kind not in ("fixed", "random", "learned"):
        return False
    # the bias of the fully connected layer has no place in one weight: it is no constant near the border
    return convolution.fc_bias is None and convolution.heads <= MAX_FOLDED_HEADS  # type: ignore[operator]


def _folded(convolution: ShiftConv, beta: Tensor) -> ShiftConv:
    """The path of kind `full` that gives beta times the same."""
    weight = fold(exact(convolution.fc_weight) * beta, exact(convolution.shift_weight))
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
    folded.weight = constant(weight, convolution.fc_weight)
    return folded.eval()


def exact(tensor: Tensor) -> Tensor:
    """A tensor in float64, so that folding adds one rounding; on the CPU, since not every device has float64."""
    return tensor.detach().to("cpu", torch.float64)


def constant(values: Tensor, like: Tensor) -> nn.Parameter:
    """A parameter that takes no gradient, of the type and on the device of `like`."""
    return nn.Parameter(values.to(like), requires_grad=False)
