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
    alpha, beta = mix_constants(block.mix)
    if isinstance(block.convolution, nn.Module) and _can_fold(block.convolution):
        block.convolution, beta = _folded(block.convolution, beta), torch.ones(1)
    elif _owns_weights(block.convolution, ShiftConv, uses) and _scale_rows(block.convolution, _last(beta), beta):
        beta = torch.ones(1)
    attention = block.attention
    if isinstance(attention, AttentionPath) and type(attention).finish is AttentionPath.finish:
        projects = not is_observed(attention) and uses[id(attention)] == 1
        if projects and _owns_weights(attention.proj, nn.Linear, uses):
            _scale_rows(attention.proj, ("weight", "bias"), alpha)
            alpha = torch.ones(1)
    block.mix = _fixed_mix(block.mix, alpha, beta, next(block.parameters()))


def mix_constants(mix: PathMix) -> tuple[Tensor, Tensor]:
    """alpha and beta in float64, each (1,) or with one for each channel of the block's output, (C,)."""
    alpha, beta = (torch.as_tensor(weight, dtype=torch.float64, device="cpu") for weight in mix.weights())
    return alpha.detach().flatten(), beta.detach().flatten()


def _last(beta: Tensor) -> tuple[str, ...]:
    """The parameters of a convolution path of which its result is a multiple, whatever its kind.

    With a weight for each channel these are the kernels; a path whose kernels are no parameters has none.
    """
    return ("weight", "fc_weight", "fc_bias") if len(beta) == 1 else ("weight", "shift_weight")


def _owns_weights(module: nn.Module | None, kind: type[nn.Module], uses: Counter[int]) -> TypeGuard[nn.Module]:
    return module is not None and is_plain(module, kind) and uses[id(module)] == 1


def _scale_rows(module: nn.Module, names: tuple[str, ...], factors: Tensor) -> bool:
    """Multiply the rows of parameters, of those names that the module has; whether there were any."""
    found = {name: module._parameters[name] for name in names if module._parameters.get(name) is not None}
    for name, parameter in found.items():
        assert parameter is not None
        setattr(module, name, constant(exact(parameter) * rows_of(factors, parameter), parameter))
    return bool(found)


def rows_of(factors: Tensor, like: Tensor) -> Tensor:
    """Factors (C,) or (1,) in a shape that multiplies the rows of `like`."""
    return factors.view(-1, *[1] * (like.dim() - 1))


def _fixed_mix(mix: PathMix, alpha: Tensor, beta: Tensor, like: Tensor) -> PathMix:
    """A mix with these weights, that of two paths or of the one that `mix` has."""
    if not (mix.has_attention and mix.has_convolution):
        return mix
    if bool((alpha == 1).all() and (beta == 1).all()):
        return PathMix("sum", mix.stage).eval()
    count = max(len(alpha), len(beta))
    shape, per = ((), "block") if count == 1 else ((count,), "channel")
    fixed = PathMix("learned", mix.stage, per=per, heads=mix.heads, channels=mix.channels)
    fixed.alpha, fixed.beta = (constant(w.expand(count).reshape(shape), like) for w in (alpha, beta))
    return fixed.eval()


def _can_fold(convolution: nn.Module) -> bool:
    if not is_plain(convolution, ShiftConv) or convolution.kind not in ("fixed", "random", "learned"):
        return False
    # the bias of the fully connected layer has no place in one weight: it is no constant near the border
    return convolution.fc_bias is None and convolution.heads <= MAX_FOLDED_HEADS  # type: ignore[operator]


def _folded(convolution: ShiftConv, beta: Tensor) -> ShiftConv:
    """The path of kind `full` that gives beta times the same."""
    weight = fold(exact(convolution.fc_weight), exact(convolution.shift_weight))
    weight = weight * rows_of(beta, weight)
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
