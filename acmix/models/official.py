"""The authors' released checkpoints (github.com/LeapLabTHU/ACmix) into ours.

Every parameter of ours is one official tensor, or several stacked by rows, up to its shape; so a table of names is all
the conversion there is.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from acmix.layers import ACmix, LocalAttention, WindowAttention
from acmix.models.acmix_resnet import ACmixResNet
from acmix.models.acmix_swin import ACmixSwin

# name in our block → names in the official block whose rows, stacked, it is
_COMMON = {
    "convolution.fc_weight": ("fc.weight",),
    "convolution.fc_bias": ("fc.bias",),
    "convolution.shift_weight": ("dep_conv.weight",),
    "mix.alpha": ("rate1",),
    "mix.beta": ("rate2",),
}
_LOCAL = _COMMON | {
    "qkv.weight": ("conv1.weight", "conv2.weight", "conv3.weight"),
    "qkv.bias": ("conv1.bias", "conv2.bias", "conv3.bias"),
    "attention.position_weight": ("conv_p.weight",),
}
_WINDOW = _COMMON | {
    "qkv.weight": ("qkv.weight",),
    "qkv.bias": ("qkv.bias",),
    "attention.proj.weight": ("proj.weight",),
    "attention.proj.bias": ("proj.bias",),
    "attention.relative_position_bias_table": ("relative_position_bias_table",),
}
# official names that stand for 1×1 convolutions where we keep a matrix
_POINTWISE = {"conv1.weight", "conv2.weight", "conv3.weight", "conv_p.weight", "fc.weight"}


def load_official(module: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Load the authors' weights into a bare ACmix block, an ACmix-ResNet or an ACmix-Swin, strictly.

    Every official tensor is used, except those that change nothing: `conv_p.bias`, which cancels; the buffers
    `relative_position_index` and `attn_mask`, which we compute; and a `dep_conv.bias` of zeros, which the authors'
    initialisation removes from the module before anything is saved.

    Args:
        module: `ACmix`, `ACmixResNet` or `ACmixSwin`; its parameters are overwritten in place, in their own dtype.
        state_dict: Names to tensors, or a checkpoint that holds them under `model` or `state_dict`; names may have the
            prefix `module.` of a wrapped network.

    Raises:
        ValueError: listing every missing and unexpected name and every shape that differs, before anything is changed.
    """
    given = _unwrap(state_dict)
    ours = module.state_dict()
    plan = dict(_plan(module, ours))
    expected = {name: shape for sources in plan.values() for name, shape in sources}
    optional = {name for name in expected if name.endswith("num_batches_tracked")}
    problems = [f"missing: {name}" for name in expected if name not in given and name not in optional]
    for name, value in given.items():
        if name in expected:
            if tuple(value.shape) != expected[name]:
                problems.append(f"shape: {name} is {tuple(value.shape)}, the model needs {expected[name]}")
        elif not _without_effect(name, value, module):
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


def _unwrap(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The names and tensors inside a checkpoint."""
    for key in ("model", "state_dict"):
        if isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
    if strangers := [str(name) for name, value in checkpoint.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"not a state dict: these entries are no tensors: {', '.join(strangers)}")
    wrapped = bool(checkpoint) and all(name.startswith("module.") for name in checkpoint)
    return {name.removeprefix("module.") if wrapped else name: value for name, value in checkpoint.items()}


def _plan(module: nn.Module, ours: Mapping[str, Tensor]) -> Iterator[tuple[str, list[tuple[str, tuple[int, ...]]]]]:
    """For each name of ours: the official names, with their shapes, that make it up."""
    if not isinstance(module, (ACmix, ACmixResNet, ACmixSwin)):
        raise ValueError(f"load_official takes ACmix, ACmixResNet or ACmixSwin, not {type(module).__name__}")
    blocks = {path: block for path, block in module.named_modules() if isinstance(block, ACmix)}
    owner = {f"{path}.{name}" if path else name: path for path, block in blocks.items() for name in block.state_dict()}
    for name, tensor in ours.items():
        if name not in owner:
            yield name, [(_official_name(name, module), tuple(tensor.shape))]
            continue
        path = owner[name]
        inner = name[len(path) + 1 :] if path else name
        table = _WINDOW if isinstance(blocks[path].attention, WindowAttention) else _LOCAL
        if inner not in table:
            raise ValueError(
                f"{name} has no counterpart in the authors' code: their block is mix=learned, shift=learned"
            )
        prefix = _official_block(path, module)
        rows = len(table[inner])
        yield name, [(prefix + part, _official_shape(part, tensor, rows)) for part in table[inner]]


def _official_shape(name: str, tensor: Tensor, rows: int) -> tuple[int, ...]:
    if tensor.dim() == 0:
        return (1,)
    shape = (tensor.shape[0] // rows, *tensor.shape[1:])
    return (*shape, 1, 1) if name in _POINTWISE else shape


def _official_name(name: str, module: nn.Module) -> str:
    """The official name of a tensor outside the blocks."""
    if isinstance(module, ACmixSwin):
        name = re.sub(r"^head\.fc\.", "head.", name)
        # the authors merge patches at the end of a stage, we at the beginning of the next
        name = re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name)
    return name


def _official_block(path: str, module: nn.Module) -> str:
    """The official prefix of the block at `path`."""
    if not path:
        return ""
    return path.removesuffix("acmix") + ("attn." if isinstance(module, ACmixSwin) else "conv2.")


def _without_effect(name: str, value: Tensor, module: nn.Module) -> bool:
    """Whether an official tensor that we have no place for may be dropped."""
    for path, block in module.named_modules():
        if not isinstance(block, ACmix):
            continue
        prefix = _official_block(path, module)
        if isinstance(block.attention, LocalAttention) and name == prefix + "conv_p.bias":
            return True
        if isinstance(block.attention, WindowAttention) and name in (
            prefix + "relative_position_index",
            prefix.removesuffix("attn.") + "attn_mask",
        ):
            return True
        if block.convolution is not None and name == prefix + "dep_conv.bias":
            return not value.any()
    return False
