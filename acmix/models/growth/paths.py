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
    text = f"alpha {alpha:.4g}, beta {beta:.4g}"
    if block.attention is not None and alpha == 0 and not _has(given, "attention"):
        grown.new += [f"attention.{key}" for key, _ in block.attention.named_parameters()]
        grown.values |= {f"attention.{key}": value for key, value in block.attention.state_dict().items()}
        alpha, beta, text = share, (1 - share) * beta, "attention is new"
    if block.convolution is not None and not _has(given, "convolution"):
        grown.new += [f"convolution.{key}" for key, _ in block.convolution.named_parameters()]
        grown.values |= {f"convolution.{key}": value for key, value in block.convolution.state_dict().items()}
        alpha, beta, text = (1 - share) * alpha, share, "convolution is new"
    elif block.convolution is not None:
        grown.values |= {f"convolution.{k}": v for k, v in _convolution(name, block.convolution, given).items()}
    else:
        grown.values |= {key: value for key, value in given.items() if key.startswith("convolution.")}
    weights = mix_values(name, block, alpha, beta)
    if not all(key in given for key in weights):
        grown.new += list(weights)
    grown.values |= weights
    if "new" in text:
        text += f", alpha {alpha:.4g}, beta {beta:.4g}"
    grown.text = text
    return grown


def mix_values(name: str, block: ACmix, alpha: float, beta: float) -> dict[str, Tensor]:
    """The values of a block's learned path weights that make them alpha and beta.

    Raises UserError where the mode of the mix has no such pair.
    """
    mix = block.mix
    exact = {"mix.alpha": torch.tensor(alpha, dtype=torch.float64), "mix.beta": torch.tensor(beta, dtype=torch.float64)}
    if mix.mode == "learned":
        return exact
    if mix.mode == "convex" and abs(alpha + beta - 1) < 1e-6:
        return {"mix.alpha": exact["mix.alpha"]}
    fixed = mix.weights() if mix.mode != "convex" else None
    if fixed != (alpha, beta):
        raise UserError(
            f"{name}: mix {mix.mode} cannot hold the path weights alpha {alpha:.4g} and beta {beta:.4g}; grow into "
            "mix=learned"
        )
    return {}


def _has(given: Mapping[str, Tensor], path: str) -> bool:
    return any(key.startswith(f"{path}.") for key in given)


def _weights(block: ACmix, given: Mapping[str, Tensor]) -> tuple[float, float]:
    """The effective (alpha, beta) of the source's block."""
    if "mix.beta" in given:
        return float(given["mix.alpha"]), float(given["mix.beta"])
    if "mix.alpha" in given:
        return float(given["mix.alpha"]), 1 - float(given["mix.alpha"])
    convolution = _has(given, "convolution")
    without_parameters = block.attention is not None and not block.attention.state_dict()
    attention = _has(given, "attention") or (without_parameters and not convolution)
    return float(attention), float(convolution)


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
