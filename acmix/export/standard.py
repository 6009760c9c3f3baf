"""A network rewritten in operators that every runtime knows, its ACmix blocks folded or as they are."""

import copy
from collections import Counter

import torch
from torch import Tensor, nn

from acmix.export.blocks import FoldedLocalBlock, FoldedWindowBlock, Size
from acmix.export.windows import WindowedAttention, parts, position_term
from acmix.layers import ACmix, AttentionPath, LocalAttention, ShiftConv, WindowAttention
from acmix.layers.inference import conv_norm_pairs, fuse, is_constant_norm
from acmix.layers.mix import PathMix
from acmix.layers.plain import is_plain


def standard(model: nn.Module, image: Tensor, *, fold: bool = True, any_size: bool = False) -> nn.Module:
    """A copy of a network, for inference, without operations of ours.

    Blocks with local or window attention are replaced by forms of few operators; other paths compute by their own
    reference.

    Args:
        model: The network, on the CPU; it is not changed.
        image: One image or more, (B, C, H, W), of the size that it is to take.
        fold: Compute once what does not depend on the image (`acmix.fuse`, and what only a graph gains by); False
            leaves every step as in training.
        any_size: Whether the copy is to take images of any size.
    """
    rewritten = fuse(model) if fold else copy.deepcopy(model).eval().requires_grad_(False)
    sizes = _map_sizes(rewritten, image)
    modules = list(rewritten.modules())
    uses = Counter(id(child) for module in modules for child in module._modules.values())
    norms = _norms_after_blocks(modules, uses) if fold else {}
    for module in modules:
        for name, child in module.named_children():
            if isinstance(child, ACmix):
                size = None if any_size else sizes[child]
                form = _folded(child, size, norms.get(child)) if fold else None
                if form is not None and child in norms:
                    _drop(modules, norms[child])
                module._modules[name] = _plain(child) if form is None else form.eval()
    return rewritten


class PlainLocalAttention(AttentionPath):
    """Local attention with its positions, scale and windows computed at the call."""

    def __init__(self, path: LocalAttention) -> None:
        super().__init__(path.heads, path.head_dim)
        self.position_weight, self.windows = path.position_weight, WindowedAttention(path.window, None)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        height, width = q.shape[2:]
        offset = position_term(self.position_weight, height, width)
        q, k, v = (m.unflatten(1, (self.heads, self.head_dim)).flatten(3).mT for m in (q, k, v))
        out = self.windows(q * self.head_dim**-0.5, k - offset, v, height, width)
        size = [parts(side, self.windows.window.stride) for side in (height, width)]
        return out.mT.unflatten(3, size).flatten(1, 2)


def _folded(block: ACmix, size: Size | None, norm: nn.BatchNorm2d | None) -> nn.Module | None:
    """The block's form of few operators; None where it has parts that no form is for."""
    attention, convolution, qkv = block.attention, block.convolution, getattr(block, "qkv", None)
    if not is_plain(block, ACmix) or not is_plain(block.mix, PathMix) or qkv is None or not is_plain(qkv, nn.Linear):
        return None
    if len(qkv.weight) != 3 * block.out_channels or not (convolution is None or is_plain(convolution, ShiftConv)):
        return None
    if attention is None or is_plain(attention, LocalAttention):
        one_weight = convolution is None or convolution.folded_weight(1.0) is not None
        return FoldedLocalBlock(block, size, norm) if one_weight else None
    if not is_plain(attention, WindowAttention) or not is_plain(attention.proj, nn.Linear):  # type: ignore[arg-type]
        return None
    mixes = convolution is None or (convolution.kind in ("fixed", "random", "learned") and block.stride == 1)
    return FoldedWindowBlock(block, size) if mixes and size is not None else None


def _plain(block: ACmix) -> ACmix:
    """The block with paths that use PyTorch's own operations only."""
    if type(block.attention) is LocalAttention:
        block.attention = PlainLocalAttention(block.attention)
    elif isinstance(block.attention, AttentionPath) and not isinstance(block.attention, WindowAttention):
        block.attention.impl = "reference"
    if isinstance(block.convolution, ShiftConv):
        block.convolution.impl = "reference"
    return block


def _map_sizes(model: nn.Module, image: Tensor) -> dict[ACmix, Size]:
    """(H, W) of the input of every block."""
    sizes: dict[ACmix, Size] = {}

    def note(block: ACmix, inputs: tuple[Tensor]) -> None:
        sizes[block] = (inputs[0].shape[2], inputs[0].shape[3])

    hooks = [m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, ACmix)]  # type: ignore[arg-type]
    with torch.inference_mode():
        model(image[:1])
    for hook in hooks:
        hook.remove()
    return sizes


def _norms_after_blocks(modules: list[nn.Module], uses: Counter[int]) -> dict[ACmix, nn.BatchNorm2d]:
    """Blocks whose output a batch norm alone reads, and these norms."""
    found: dict[ACmix, nn.BatchNorm2d] = {}
    for module in modules:
        for name, norm_name in conv_norm_pairs(module):
            block, norm = module._modules.get(name), module._modules.get(norm_name)
            if isinstance(block, ACmix) and is_constant_norm(norm) and uses[id(block)] == uses[id(norm)] == 1:
                found[block] = norm  # type: ignore[assignment]
    return found


def _drop(modules: list[nn.Module], norm: nn.Module) -> None:
    for module in modules:
        for name, child in module._modules.items():
            if child is norm:
                module._modules[name] = nn.Identity().eval()
