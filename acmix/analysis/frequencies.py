"""How much of a map's energy lies in high frequencies."""

import torch
from torch import Tensor

CUTOFF = 0.25
"""Cycles per pixel of the map from which a frequency counts as high: half of the highest, 0.5, along an axis."""


def high_frequency_energy(maps: Tensor) -> Tensor:
    """Energy Σ |F|² of the frequencies at or above `CUTOFF` in maps (B, C, H, W), in all directions: a scalar, float64.

    F is the orthonormal discrete Fourier transform, so the energy of all frequencies is the sum of the squared values.
    Divided by that sum it is the share of high frequencies, from 0 to 1: 0 for a constant map, about 0.8 for white
    noise. After Park and Kim, "How do vision transformers work?", https://arxiv.org/abs/2202.06709, who find that
    attention passes low frequencies and convolution high ones.
    """
    height, width = maps.shape[-2:]
    rows = torch.fft.fftfreq(height, device=maps.device)
    columns = torch.fft.rfftfreq(width, device=maps.device)
    high = rows[:, None].square() + columns.square() >= CUTOFF**2
    # the transform of a real map is symmetric: each column but those of frequency 0 and 0.5 stands for two
    twice = torch.where((columns > 0) & (columns < 0.5), 2.0, 1.0)
    wide = maps.to(torch.promote_types(maps.dtype, torch.float32))
    power = torch.view_as_real(torch.fft.rfft2(wide, norm="ortho")).square().sum((0, 1, 4))
    return (power.double() * (high * twice)).sum()
