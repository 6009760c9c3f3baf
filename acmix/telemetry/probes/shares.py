"""The probe `path_shares`: what each path adds to its block, and where attention looks, on some validation images."""

from typing import Any

from torch import Tensor, nn

from acmix.analysis.blocks import measuring
from acmix.analysis.paths import PathMeasures
from acmix.telemetry.probes.probe import Probe, register_probe

_LOGGED_ELSEWHERE = ("alpha", "beta", "shift_distance")


def path_shares(model: nn.Module, images: Tensor) -> list[dict[str, Any]]:
    """A row for each block with the measures of `acmix.analysis.paths` that need images (B, C, H, W)."""
    measures = PathMeasures(model)
    if not measures.blocks:
        return []
    with measuring(model):
        measures.add(images)
    return [{key: value for key, value in row.items() if key not in _LOGGED_ELSEWHERE} for row in measures.rows()]


register_probe(Probe("path_shares", path_shares, needs="images", shown=("attention_share",)))
