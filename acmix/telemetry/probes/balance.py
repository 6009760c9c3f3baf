"""The probe `path_balance`: where the path weights lean and are pushed, and how far the shift kernels have moved."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from acmix.analysis.blocks import acmix_blocks
from acmix.analysis.kernels import shift_distance
from acmix.analysis.weights import log_ratio
from acmix.telemetry.probes.paths import path_layers
from acmix.telemetry.probes.probe import Probe, register_probe


def path_balance(model: nn.Module, gradients: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """A row for each block: `log_ratio`, `shift_distance` (see acmix.analysis), `alpha_gradient`, `beta_gradient`.

    The gradients are those of the last update, averaged over the batch and all processes, before clipping. What a block
    does not have is None.
    """
    rows, weights = [], {row["layer"]: row for row in path_layers(model)}
    for block in acmix_blocks(model):
        mix = block.module.mix
        both = mix.has_attention and mix.has_convolution
        row = weights.get(block.layer)  # none for a block of one path among others of two
        rows.append(
            {
                **block.place,
                "log_ratio": log_ratio(row["alpha"], row["beta"]) if row and both else None,
                "alpha_gradient": gradients.get(f"{block.layer}.mix.alpha"),
                "beta_gradient": gradients.get(f"{block.layer}.mix.beta"),
                "shift_distance": shift_distance(block.module.convolution),
            }
        )
    return rows


register_probe(Probe("path_balance", path_balance, needs="gradients", shown=()))
