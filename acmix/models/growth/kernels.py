"""A 3×3 convolution as the convolution path of an ACmix block: kernels of low rank over shared projections.

Group c of the path makes N channels of its 3N maps. Seen from the block's input, its kernels are an (N·k²) × C_in
matrix, of rank k² at most (3N for `shift: full`): what the projections times the kernels can hold.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from acmix.errors import UserError
from acmix.layers import ACmix, ShiftConv


@dataclass
class Factors:
    """Kernels of low rank: group c is kernels[c] · maps[c].

    kernels: (d, N, k², r), from the r maps of a group to its N channels, by tap. maps: (d, r, C_in). energy: share
    (0 to 1) of the outputs' energy that they keep.
    """

    kernels: Tensor
    maps: Tensor
    energy: float


def rank(block: ACmix) -> int:
    """The rank of a group's kernels that the block's convolution path can hold."""
    path = convolution_path(block)
    return 3 * block.heads if path.kind == "full" else min(path.kernel_size**2, 3 * block.heads)


def convolution_path(block: ACmix) -> ShiftConv:
    """The block's convolution path; the block must have one."""
    assert isinstance(block.convolution, ShiftConv)
    return block.convolution


def refuse_unfit(name: str, block: ACmix, conv_weight: Tensor) -> None:
    """UserError where the block has no path that can hold kernels like those of a convolution of this weight."""
    path = block.convolution
    if not isinstance(path, ShiftConv) or path.kind not in ("random", "learned", "full"):
        has = (
            "no convolution path" if not isinstance(path, ShiftConv) else f"shift {path.kind}, whose kernels are fixed"
        )
        raise UserError(f"{name}: has {has}; a 3×3 convolution can be grown into shift=learned or shift=full")
    if conv_weight.dim() == 4 and tuple(conv_weight.shape[2:]) != (path.kernel_size,) * 2:
        raise UserError(
            f"{name}: kernel_conv {path.kernel_size} is not that of the convolution, {conv_weight.shape[2]}"
        )


def output_scale(norm: nn.Module) -> Tensor:
    """How much the normalisation after the convolution makes of each of its channels (C,), in float64."""
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_var is not None
    scale = norm.weight.double().abs() * (norm.running_var.double() + norm.eps).rsqrt()
    return scale.clamp_min(1e-4 * float(scale.max()) + 1e-30)  # channels that count nothing still get kernels


def moments_from_norm(norm: nn.Module) -> Tensor:
    """Second moments (C, C) of relu(norm(·)) where every channel is normal and they are independent; float64.

    What a batch norm says of the layer after it, without any image.
    """
    assert isinstance(norm, nn.BatchNorm2d)
    scale, shift = norm.weight.double().abs().clamp_min(1e-12), norm.bias.double()
    above = 0.5 * (1 + torch.erf(shift / scale / math.sqrt(2)))  # share of the values above 0
    density = torch.exp(-((shift / scale) ** 2) / 2) / math.sqrt(2 * math.pi)
    mean = shift * above + scale * density
    moments = torch.outer(mean, mean)
    moments.diagonal().copy_((shift**2 + scale**2) * above + shift * scale * density)
    return moments


def factorise(conv_weight: Tensor, moments: Tensor, scale: Tensor, heads: int, most: int) -> Factors:
    """The kernels of rank `most` that keep most of the energy of the outputs.

    The energy is that of each tap alone, of inputs with these second moments; the truncated SVD of every group's
    matrix times their square root keeps most of it.

    Args:
        conv_weight: (C, C_in, k, k), rows in the order of the block's outputs, (head_dim, head).
        moments: (C_in, C_in), second moments of the inputs.
        scale: (C,), what the error of each output counts.
        heads: N.
        most: Rank.
    """
    taps = conv_weight.shape[2] * conv_weight.shape[3]
    matrix = conv_weight.double().flatten(2).mT * scale[:, None, None]  # (C, k², C_in)
    matrix = matrix.reshape(-1, heads * taps, conv_weight.shape[1])  # (d, N k², C_in)
    energies, directions = torch.linalg.eigh(matrix @ moments @ matrix.mT)  # ascending
    energies, directions = energies.clamp_min(0)[:, -most:].flip(1), directions[:, :, -most:].flip(2)
    total = (matrix @ moments * matrix).sum().clamp_min(1e-30)
    size = energies.sqrt().clamp_min(1e-6 * math.sqrt(float(total) / len(matrix)) + 1e-30)
    kernels = (directions * size[:, None]).unflatten(1, (heads, taps)) / scale.view(-1, heads, 1, 1)
    # the maps then have second moment 1, which suits q and k of the attention to come
    return Factors(kernels, directions.mT @ matrix / size[:, :, None], min(1.0, float(energies.sum() / total)))


def write(block: ACmix, factors: Factors) -> None:
    """Put the kernels into a block: projections without bias, convolution path."""
    path, (groups, heads, taps, held) = convolution_path(block), factors.kernels.shape
    maps, kernels = factors.maps, factors.kernels.mT.flatten(0, 1)  # (C, r, k²)
    if path.kind == "full":
        spare = 3 * heads - held
        maps = torch.cat([maps, maps.new_zeros(groups, spare, maps.shape[2])], 1)
        path.weight.copy_(nn.functional.pad(kernels, (0, 0, 0, spare)).view_as(path.weight))
    else:
        # spread over all 3N maps, so that every head of q, k and v sees something of the input
        generator = torch.Generator().manual_seed(0)
        turned = torch.randn(3 * heads, 3 * heads, dtype=torch.float64, generator=generator)
        mixing = torch.linalg.qr(turned)[0][:held].to(maps)  # (r, 3N), orthonormal rows
        maps = mixing.mT @ maps
        path.fc_weight.zero_()[:held] = mixing.to(path.fc_weight)
        if path.fc_bias is not None:
            path.fc_bias.zero_()
        path.shift_weight.copy_(nn.functional.pad(kernels, (0, 0, 0, taps - held)).view_as(path.shift_weight))
    block.qkv.weight.copy_(maps.transpose(0, 1).flatten(0, 1))  # rows (map, head_dim)
    block.qkv.bias.zero_()


def share_groups(conv_weight: Tensor, moments: Tensor, scale: Tensor, heads: int, most: int) -> Tensor:
    """An order of the output channels (C,) in which those that share directions share a group.

    Greedy: a group begins with the strongest channel left and takes, one by one, the channel with which kernels of rank
    `most` keep the largest share of their energy.
    """
    taps = conv_weight.shape[2] * conv_weight.shape[3]
    matrix = (conv_weight.double().flatten(2).mT * scale[:, None, None]).flatten(0, 1)  # (C k², C_in)
    gram = (matrix @ moments @ matrix.mT).unflatten(0, (-1, taps)).unflatten(2, (-1, taps)).transpose(1, 2)
    energy = gram.diagonal(dim1=0, dim2=1).diagonal(dim1=0, dim2=1).sum(1)  # (C,)
    left, order = energy.argsort(descending=True), []
    while len(left):
        group, left = left[:1], left[1:]
        while len(group) < heads:
            tried = torch.cat([group.expand(len(left), -1), left[:, None]], 1)
            kept = _kept(gram, tried, most) / energy[tried].sum(1).clamp_min(1e-30)
            best = int(kept.argmax())
            group, left = tried[best], torch.cat([left[:best], left[best + 1 :]])
        order.append(group)
    return torch.cat(order)


def _kept(gram: Tensor, groups: Tensor, most: int) -> Tensor:
    """Energy that kernels of rank `most` keep of each group (G, n) of channels; gram is (C, C, k², k²)."""
    chosen = gram[groups[:, :, None], groups[:, None, :]]  # (G, n, n, k², k²)
    square = chosen.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return torch.linalg.eigvalsh(square)[:, -most:].sum(1)
