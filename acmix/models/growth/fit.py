"""Whether a source's tensors are those that a network needs, and in words a person can use why they are not."""

import re
from collections.abc import Mapping

from torch import Tensor, nn

from acmix.errors import UserError

_BUFFERS = re.compile(r"(^|\.)(relative_position_index|attn_mask)$")
_FIRST_BLOCK = re.compile(r"layer1\.(blocks\.)?0\.|(layers|stages)\.0\.blocks\.0\.")
_RENAMED = (
    (re.compile(r"\.attn\.qkv\."), ".acmix.qkv."),
    (re.compile(r"\.attn\.(proj\.|relative_position_bias_table$)"), r".acmix.attention.\1"),
)


def our_names(state_dict: Mapping[str, Tensor], dropped: dict[str, str]) -> dict[str, Tensor]:
    """The tensors under the names that our networks give them; what a network computes itself goes to `dropped`."""
    renamed = {}
    for name, value in state_dict.items():
        if _BUFFERS.search(name):
            dropped[name] = "the network computes it"
            continue
        ours = name
        for pattern, replacement in _RENAMED:
            ours = pattern.sub(replacement, ours)
        renamed[ours] = value
    return renamed


def classifier_names(network: nn.Module) -> list[str]:
    """Names of the classifier's tensors."""
    classifier = getattr(network, "get_classifier", lambda: None)()
    prefixes = [name for name, module in network.named_modules() if module is classifier and name]
    return [name for name in network.state_dict() if any(name.startswith(f"{prefix}.") for prefix in prefixes)]


def refuse_misfit(network: nn.Module, given: Mapping[str, Tensor], needed: Mapping[str, tuple[int, ...]]) -> None:
    """UserError listing every tensor that is missing, unexpected or of another shape, with the likely reason first.

    Args:
        network: The network to grow, for messages.
        given: The source's tensors, by our names, without those dropped.
        needed: Names and shapes that the source must have.
    """
    problems = [f"missing: {name}" for name in needed if name not in given]
    problems += [f"unexpected: {name}" for name in given if name not in needed]
    problems += [
        f"shape: {name} is {tuple(given[name].shape)}, the network needs {shape}"
        for name, shape in needed.items()
        if name in given and tuple(given[name].shape) != shape
    ]
    if not problems:
        return
    more = [f"… {len(problems) - 12} more"] if len(problems) > 12 else []
    head = f"{type(network).__name__} cannot be grown from these weights: {_reason(given, needed)}"
    raise UserError("\n  ".join([head, *problems[:12], *more]))


def _reason(given: Mapping[str, Tensor], needed: Mapping[str, tuple[int, ...]]) -> str:
    stem = [name for name in needed if name.startswith(("conv1.", "bn1.", "patch_embed.", "stem"))]
    if any(name not in given or tuple(given[name].shape) != needed[name] for name in stem):
        return "another stem"
    theirs, ours = _depths(given), _depths(needed)
    if theirs and any(name not in given for name in needed if _FIRST_BLOCK.match(name)):
        return "blocks of another kind"
    if theirs != ours and theirs and ours:
        key = "depths" if any(name.startswith(("layers.", "stages.")) for name in needed) else "layers"
        return f"other depths, {theirs} blocks in its stages where the network has {ours}; set model.kwargs.{key}"
    if any(name in given and tuple(given[name].shape) != shape for name, shape in needed.items()):
        return "other widths, heads or windows"
    return "another architecture"


def _depths(names: Mapping[str, object]) -> list[int]:
    """Number of blocks in each stage, as the names tell; empty where they follow no pattern of ours."""
    blocks: dict[str, set[str]] = {}
    for name in names:
        if match := re.match(r"layer(\d+)\.(?:blocks\.)?(\d+)\.|(?:layers|stages)\.(\d+)\.blocks\.(\d+)\.", name):
            stage, block = match.group(1, 2) if match[1] else match.group(3, 4)
            blocks.setdefault(stage, set()).add(block)
    return [len(blocks[stage]) for stage in sorted(blocks, key=int)]
