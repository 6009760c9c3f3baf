"""Blocks grown exactly: a path is added to the one that is there, with a weight of its own."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from acmix.errors import UserError
from acmix.layers import ACmix, ShiftConv
from acmix.layers.convolution import one_hot_shifts
from acmix.ops.shift_conv import fold


@dataclass
class GrownBlock:
    """What a block is to hold: values by their names in it, names that are new, how it came about."""

    values: dict[str, Tensor]
    new: list[str] = field(default_factory=list)
    text: str = ""


def grow_block(name: str, block: ACmix, given: Mapping[str, Tensor], share: float) -> GrownBlock:
    """The values of a block from those of one with the same projections, with one path or both.

    A path that the source lacks keeps the parameters that it has, and the weight `share`; the path that is there gets
    1 - share of the weight that it had.

    Args:
        name: Of the block, for messages.
        block: The block to grow.
        given: The source's tensors by their names in its block.
        share: First share of a new path, from 0 to less than 1.

    Raises:
        UserError: for a source whose paths or kernels the block cannot hold. Names and shapes are not checked here.
    """
    alpha, beta = _weights(block, given)
    grown = GrownBlock({key: value for key, value in given.items() if not key.startswith(("mix.", "convolution."))})
    added = []
    if block.attention is not None and not _has_attention(block, given):
        added, alpha, beta = ["attention"], alpha + share, (1 - share) * beta
    if block.convolution is not None and not _has(given, "convolution"):
        added, alpha, beta = ["convolution"], (1 - share) * alpha, beta + share
    elif block.convolution is not None:
        grown.values |= {f"convolution.{k}": v for k, v in _convolution(name, block.convolution, given).items()}
    else:
        grown.values |= {key: value for key, value in given.items() if key.startswith("convolution.")}
    for path in added:
        module = block.get_submodule(path)
        grown.new += [f"{path}.{key}" for key, _ in module.named_parameters()]
        grown.values |= {f"{path}.{key}": value for key, value in module.state_dict().items()}
    weights = mix_values(name, block, alpha, beta)
    grown.new += [key for key in weights if added or key not in given]
    grown.values |= weights
    grown.text = "".join(f"{path} is new, " for path in added) + f"alpha {_shown(alpha)}, beta {_shown(beta)}"
    return grown


def mix_values(name: str, block: ACmix, alpha: Tensor | float, beta: Tensor | float) -> dict[str, Tensor]:
    """The values of a block's own path weights that make them alpha and beta, numbers or a value for each weight.

    Raises UserError where the mode of the mix has no such pair.
    """
    mix, alpha, beta = block.mix, _exact(alpha), _exact(beta)
    fits = mix.mode == "learned" or (mix.mode == "convex" and bool(((alpha + beta - 1).abs() < 1e-6).all()))
    own = dict(mix.named_parameters(recurse=False))
    values = {"alpha": alpha, "beta": beta}
    if not fits and mix.mode != "convex":
        fits = all(
            bool((_exact(held) == value).all()) for held, value in zip(mix.weights(), (alpha, beta), strict=True)
        )
    if not fits or any(values[key].numel() not in (1, weight.numel()) for key, weight in own.items()):
        raise UserError(
            f"{name}: mix {mix.mode} cannot hold the path weights alpha {_shown(alpha)} and beta {_shown(beta)}; grow "
            "into mix=learned"
        )
    return {f"mix.{key}": values[key].expand(weight.shape) for key, weight in own.items()}


def _exact(weight: Tensor | float) -> Tensor:
    return torch.as_tensor(weight, dtype=torch.float64).detach().cpu()


def _shown(weight: Tensor | float) -> str:
    return f"{float(_exact(weight).mean()):.4g}"


def _has(given: Mapping[str, Tensor], path: str) -> bool:
    return any(key.startswith(f"{path}.") for key in given)


def _has_attention(block: ACmix, given: Mapping[str, Tensor]) -> bool:
    """Whether the source's block has the attention path; one without parameters is there unless only the other is."""
    if _has(given, "attention"):
        return True
    without_parameters = block.attention is not None and not block.attention.state_dict()
    return without_parameters and (_has(given, "mix") or not _has(given, "convolution"))


def _weights(block: ACmix, given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The effective (alpha, beta) of the source's block; two paths without weights are a sum."""
    if "mix.alpha" in given:
        alpha = _exact(given["mix.alpha"])
        return alpha, _exact(given["mix.beta"]) if "mix.beta" in given else 1 - alpha
    return _exact(float(_has_attention(block, given))), _exact(float(_has(given, "convolution")))


def _convolution(name: str, path: ShiftConv, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of a convolution path from those of one of any kind that it can hold."""
    theirs = {key.removeprefix("convolution."): value for key, value in given.items() if key.startswith("convolution.")}
    own = path.state_dict()
    if theirs.keys() == own.keys():
        return theirs
    if "fc_weight" in theirs:
        # the kinds `shift` and `fixed` keep no kernels
        shifts = one_hot_shifts(path.heads * path.head_dim, path.kernel_size).to(theirs["fc_weight"])
        shifts = theirs.get("shift_weight", shifts)
        if path.kind in ("random", "learned"):
            return {**theirs, "shift_weight": shifts}
        if path.kind == "full" and "fc_bias" not in theirs:
            return {"weight": fold(theirs["fc_weight"], shifts)}
    kind = "full" if "weight" in theirs else "learned"
    raise UserError(
        f"{name}: a convolution path of shift {path.kind} cannot hold the source's kernels; grow into shift={kind}"
    )
