"""Lesions: what a network loses when a path of a block, of a stage or of all blocks is silenced at inference."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

from torch import Tensor, nn

from acmix.analysis.blocks import PlacedBlock, acmix_blocks

PATHS = ("attention", "convolution")
MODES = ("zero", "mean")

Means = Mapping[str, Mapping[str, Tensor]]
"""Block's name → path → its mean output over images and pixels, (C,)."""


@dataclass(frozen=True)
class Lesion:
    """A path of some blocks, silenced: `zero`: its output is 0; `mean`: its mean output over images and pixels.

    place: {"layer": name} of a block, {"stage": number} of a stage, {"stage": "all"} of all blocks.
    """

    place: Mapping[str, Any]
    path: str
    mode: str
    blocks: tuple[PlacedBlock, ...]


def lesions_of(model: nn.Module) -> list[Lesion]:
    """Every lesion of single blocks, in depth order, then of whole stages, then of whole paths.

    Where a place has no block with the path, there is no lesion.
    """
    blocks = acmix_blocks(model)
    places: list[tuple[dict[str, Any], list[PlacedBlock]]] = [({"layer": block.layer}, [block]) for block in blocks]
    for stage in sorted({block.stage for block in blocks}):
        places.append(({"stage": stage}, [block for block in blocks if block.stage == stage]))
    places.append(({"stage": "all"}, blocks))
    found = []
    for (place, inside), path, mode in product(places, PATHS, MODES):
        hurt = tuple(block for block in inside if getattr(block.module, path) is not None)
        if hurt:
            found.append(Lesion(place, path, mode, hurt))
    return found


@contextmanager
def lesioned(lesion: Lesion, means: Means) -> Iterator[None]:
    """Silence the path while the context lasts; `means` is needed for the mode `mean`."""
    with ExitStack() as hooks:
        for block in lesion.blocks:
            mean = means[block.layer][lesion.path] if lesion.mode == "mean" else None
            hook = block.module.mix.register_forward_pre_hook(_silence(PATHS.index(lesion.path), mean))
            hooks.callback(hook.remove)
        yield


def _silence(place: int, mean: Tensor | None) -> Callable[..., tuple[Tensor | None, ...]]:
    def replace(_: nn.Module, maps: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        heard = maps[place]
        assert heard is not None
        silent = heard.new_zeros(()) if mean is None else mean.to(heard)[:, None, None]
        return tuple(silent.expand_as(heard) if i == place else path for i, path in enumerate(maps))

    return replace


def lesion_rows(lesions: Iterable[Lesion], scores: Iterable[tuple[float, float]], top1: float, loss: float) -> list:
    """A row for each lesion: its place, path, mode, and the network's `top1` (percent) and `loss` under it.

    `delta_top1` and `delta_loss` are the differences from the network unhurt: a path that matters has a `delta_top1`
    far below 0. `scores` are the (top1, loss) under each lesion.
    """
    return [
        {
            **lesion.place,
            "path": lesion.path,
            "mode": lesion.mode,
            "top1": hurt_top1,
            "delta_top1": hurt_top1 - top1,
            "loss": hurt_loss,
            "delta_loss": hurt_loss - loss,
        }
        for lesion, (hurt_top1, hurt_loss) in zip(lesions, scores, strict=True)
    ]
