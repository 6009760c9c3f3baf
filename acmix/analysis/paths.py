"""Every measure of every block's paths over some images: the rows of `eval.py --paths` and of the probe of shares."""

from typing import Any

import torch
from torch import Tensor, nn

from acmix.analysis.attention import AttentionSums
from acmix.analysis.blocks import BlockMaps, PlacedBlock, acmix_blocks, watch
from acmix.analysis.frequencies import high_frequency_energy
from acmix.analysis.kernels import shift_distance
from acmix.analysis.shares import attention_share, cosine, path_energies, rms


class BlockSums:
    """Sums over images from which a block's measures follow; float64, so that they add up exactly enough."""

    def __init__(self, block: PlacedBlock) -> None:
        self.block = block
        self.attends = block.module.attention is not None
        self.attention = AttentionSums(block.module.heads)
        self.energies = torch.zeros(5, dtype=torch.float64)  # Σ a², Σ c², Σ a·c, those of high frequencies of a and c
        self.means = torch.zeros(2, block.module.out_channels, dtype=torch.float64)  # Σ over images of a path's mean
        self.counts = torch.zeros(2, dtype=torch.float64)  # images, values of a map

    @torch.no_grad()
    def add(self, maps: BlockMaps) -> None:
        """Add what the block computed for some images."""
        weighted = maps.weighted(self.block)
        device = next(path.device for path in weighted if path is not None)
        high = [_zero(device) if path is None else high_frequency_energy(path) for path in weighted]
        self.energies = self.energies.to(device) + torch.cat([path_energies(*weighted), torch.stack(high)])
        self.means = self.means.to(device) + torch.stack(
            [
                torch.zeros(self.means.shape[1], dtype=torch.float64, device=device)
                if path is None
                else path.double().mean((2, 3)).sum(0)
                for path in (maps.attention, maps.convolution)
            ]
        )
        shape = next(path.shape for path in weighted if path is not None)
        self.counts += torch.tensor([shape[0], shape.numel()], dtype=torch.float64)
        path, stride = self.block.module.attention, self.block.module.stride
        if self.attends and path is not None and maps.q is not None and maps.k is not None:
            size = (shape[-2] * stride, shape[-1] * stride)
            self.attends = self.attention.add(path, maps.q, maps.k, size, maps.scale)

    def vector(self) -> Tensor:
        """All sums in one vector on the CPU; those of several processes may be added."""
        parts = (self.energies, self.means.flatten(), self.counts, self.attention.sums)
        return torch.cat([part.cpu() for part in parts])

    def load(self, vector: Tensor) -> None:
        """Take the sums of a `vector`."""
        sizes = [self.energies.numel(), self.means.numel(), self.counts.numel(), self.attention.sums.numel()]
        self.energies, means, self.counts, self.attention.sums = vector.split(sizes)
        self.means = means.view(self.means.shape)

    def mean_outputs(self) -> dict[str, Tensor]:
        """The mean output of each path over images and pixels, before its weight: (C,), float64."""
        attention, convolution = self.means / self.counts[0]
        return {"attention": attention, "convolution": convolution}

    def row(self, alpha: float, beta: float) -> dict[str, Any]:
        """The block's place and measures; None for what does not exist. Units and sources: see each measure."""
        module = self.block.module
        attention, convolution, product, high_attention, high_convolution = self.energies.tolist()
        values = int(self.counts[1])
        both = module.attention is not None and module.convolution is not None
        attention_rms = None if module.attention is None else rms(attention, values)
        convolution_rms = None if module.convolution is None else rms(convolution, values)
        moved = shift_distance(module.convolution)
        looks: dict[str, Any] = dict.fromkeys(
            ("entropy_bits", "entropy_share", "distance_px", "entropy_bits_heads", "distance_px_heads")
        )
        if self.attends:
            looks = self.attention.means()
        return {
            **self.block.place,
            "alpha": alpha,
            "beta": beta,
            "attention_rms": attention_rms,
            "convolution_rms": convolution_rms,
            "attention_share": attention_share(attention_rms or 0.0, convolution_rms or 0.0) if both else None,
            "cosine": cosine((attention, convolution, product)) if both else None,
            **looks,
            "attention_high_share": high_attention / attention if attention > 0 else None,
            "convolution_high_share": high_convolution / convolution if convolution > 0 else None,
            "shift_distance": None if moved is None else moved.item(),
        }


class PathMeasures:
    """The measures of all blocks of a model over the images that it is shown.

    The model should be `measuring` (see `acmix.analysis.blocks`).
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.blocks = {block.layer: BlockSums(block) for block in acmix_blocks(model)}

    def add(self, images: Tensor) -> Tensor:
        """Run the model on images (B, C, H, W) and add what its blocks computed; returns the logits."""
        return watch(self.model, images, lambda block, maps: self.blocks[block.layer].add(maps))

    def rows(self) -> list[dict[str, Any]]:
        """A row for each block, in depth order."""
        return [sums.row(*map(_mean, sums.block.module.mix.weights())) for sums in self.blocks.values()]


def _mean(weight: Tensor | float) -> float:
    return float(weight.detach().mean()) if isinstance(weight, Tensor) else weight


def _zero(device: torch.device) -> Tensor:
    return torch.zeros((), dtype=torch.float64, device=device)
