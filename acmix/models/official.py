"""Load the checkpoints that the authors released (github.com/LeapLabTHU/ACmix) into our networks.

Every parameter of ours is one official tensor, or several stacked by rows, up to its shape; so a table of names is all
the conversion there is. Each family's file registers its own table.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from acmix.checkpoint.state_dict import state_dict_refusal
from acmix.layers import ACmix, AttentionPath, WindowAttention
from acmix.models.windows import resize_bias_table

# our name in a block → the official names in theirs whose rows, stacked, it is; the same in every family
_EVERY_BLOCK = {
    "convolution.fc_weight": ("fc.weight",),
    "convolution.fc_bias": ("fc.bias",),
    "convolution.shift_weight": ("dep_conv.weight",),
    "mix.alpha": ("rate1",),
    "mix.beta": ("rate2",),
}


@dataclass(frozen=True)
class OfficialNames:
    """The names that the authors' code gives to the tensors of one family.

    network: Class of our networks.
    attention: Class of the attention path in their blocks; it tells which family a bare block belongs to.
    layer: What the authors call the layer that is `acmix` in our network.
    block: Our name inside a block → the official names inside theirs whose rows, stacked, it is; the convolution path
        and the path weights are the same in every family and need no entry.
    pointwise: Official names inside a block that are 1×1 convolutions where we keep a matrix.
    without_effect: Official names, `layer` included, of tensors that change nothing and have no place in ours.
    rename: Our name outside the blocks → the official one.
    """

    network: type[nn.Module]
    attention: type[AttentionPath]
    layer: str
    block: Mapping[str, tuple[str, ...]]
    pointwise: frozenset[str] = frozenset()
    without_effect: frozenset[str] = frozenset()
    rename: Callable[[str], str] = str

    def absolute(self, path: str, name: str) -> str:
        """Official name of a tensor near the block at `path`, from its name relative to the module around the block."""
        return path.removesuffix("acmix") + name if path else name.removeprefix(f"{self.layer}.")

    def shape(self, name: str, tensor: Tensor, parts: int) -> tuple[int, ...]:
        """Official shape of `name` inside a block, one of the `parts` that make up our `tensor`."""
        if tensor.dim() == 0:
            return (1,)
        shape = (tensor.shape[0] // parts, *tensor.shape[1:])
        return (*shape, 1, 1) if name == "fc.weight" or name in self.pointwise else shape


_FAMILIES: list[OfficialNames] = []


def register_official(names: OfficialNames) -> None:
    """Let `load_official` load the authors' weights into a family."""
    _FAMILIES.append(names)


def load_official(module: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Load the authors' weights into a bare ACmix block or a network of a registered family, strictly.

    Position biases that were made for other windows are interpolated, and a line on stderr says so.

    Every official tensor is used, except those that change nothing: the family's own (`OfficialNames.without_effect`)
    and a `dep_conv.bias` of zeros, which the authors' initialisation removes from the module before anything is saved.

    Args:
        module: `ACmix`, or a network such as `ACmixResNet`; its parameters are overwritten in place, in their dtype.
        state_dict: Names to tensors, or a checkpoint that holds them under `model` or `state_dict`; names may have the
            prefix `module.` of a wrapped network.

    Raises:
        ValueError: listing every missing and unexpected name and every shape that differs, before anything is changed.
    """
    given = _unwrap(state_dict)
    names = _family(module)
    ours = module.state_dict()
    blocks = {path: block for path, block in module.named_modules() if isinstance(block, ACmix)}
    plan = dict(_plan(names, ours, blocks))
    _fit_bias_tables(module, plan, given)
    expected = {name: shape for sources in plan.values() for name, shape in sources}
    optional = {name for name in expected if name.endswith("num_batches_tracked")}
    problems = [f"missing: {name}" for name in expected if name not in given and name not in optional]
    for name, value in given.items():
        if name in expected:
            if tuple(value.shape) != expected[name]:
                problems.append(f"shape: {name} is {tuple(value.shape)}, the model needs {expected[name]}")
        elif not any(_without_effect(names, path, block, name, value) for path, block in blocks.items()):
            problems.append(f"unexpected: {name}")
    if problems:
        raise ValueError(
            "\n  ".join([f"not the authors' weights of this {type(module).__name__}; check its arguments:", *problems])
        )
    with torch.no_grad():
        for target, sources in plan.items():
            if all(name in given for name, _ in sources):
                stacked = torch.cat([given[name].flatten() for name, _ in sources])
                ours[target].copy_(stacked.view(ours[target].shape))


def _fit_bias_tables(module: nn.Module, plan: Mapping[str, list[tuple[str, tuple[int, ...]]]], given: Any) -> None:
    """Interpolate the position biases that were made for other windows, and say so."""
    other = 0
    for target, sources in plan.items():
        path, _, last = target.rpartition(".")
        [(name, shape), *_] = sources
        attention = module.get_submodule(path)
        if not isinstance(attention, WindowAttention) or last != "relative_position_bias_table" or name not in given:
            continue
        if given[name].dim() == 2 and given[name].shape[0] != shape[0]:
            given[name] = resize_bias_table(given[name], attention.window_size)
            other += 1
    if other:
        print(f"warning: {other} tables of position biases are for other windows; interpolated", file=sys.stderr)


def _unwrap(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The names and tensors inside a checkpoint."""
    for key in ("model", "state_dict"):
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
    if refusal := state_dict_refusal(checkpoint):
        raise ValueError(f"not a state dict: {refusal}")
    if strangers := [repr(name) for name in checkpoint if not isinstance(name, str)]:
        raise ValueError(f"not a state dict: these names are no text: {', '.join(strangers)}")
    wrapped = bool(checkpoint) and all(name.startswith("module.") for name in checkpoint)
    return {name.removeprefix("module.") if wrapped else name: value for name, value in checkpoint.items()}


def _family(module: nn.Module) -> OfficialNames:
    """The family of a network by its class, of a bare block by its attention path."""
    for names in _FAMILIES:
        if isinstance(module, names.network):
            return names
        if isinstance(module, ACmix) and isinstance(module.attention, names.attention):
            return names
    if isinstance(module, ACmix):
        found = "no attention path" if module.attention is None else type(module.attention).__name__
        known = " or ".join(names.attention.__name__ for names in _FAMILIES)
        raise ValueError(f"a block with {found} has no counterpart in the authors' code: theirs have {known}")
    *others, last = ["ACmix", *(names.network.__name__ for names in _FAMILIES)]
    raise ValueError(f"load_official takes {', '.join(others)} or {last}, not {type(module).__name__}")


def _plan(
    names: OfficialNames, ours: Mapping[str, Tensor], blocks: Mapping[str, ACmix]
) -> Iterator[tuple[str, list[tuple[str, tuple[int, ...]]]]]:
    """For each name of ours: the official names, with their shapes, that make it up."""
    table = {**_EVERY_BLOCK, **names.block}
    owner = {f"{path}.{name}" if path else name: path for path, block in blocks.items() for name in block.state_dict()}
    for name, tensor in ours.items():
        if name not in owner:
            yield name, [(names.rename(name), tuple(tensor.shape))]
            continue
        path = owner[name]
        inner = name[len(path) + 1 :] if path else name
        if inner not in table:
            raise ValueError(
                f"{name} has no counterpart in the authors' code: their block is mix=learned, shift=learned"
            )
        parts = table[inner]
        yield (
            name,
            [(names.absolute(path, f"{names.layer}.{part}"), names.shape(part, tensor, len(parts))) for part in parts],
        )


def _without_effect(names: OfficialNames, path: str, block: ACmix, name: str, value: Tensor) -> bool:
    """Whether an official tensor that we have no place for belongs to this block and may be dropped."""
    if name == names.absolute(path, f"{names.layer}.dep_conv.bias"):
        return block.convolution is not None and not value.any()
    return block.attention is not None and any(name == names.absolute(path, part) for part in names.without_effect)
