"""What the paths of a trained network do and what it loses without them: the answer of `eval.py --paths`."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from acmix.analysis.blocks import measuring
from acmix.analysis.lesions import Lesion, Means, lesion_rows, lesioned, lesions_of
from acmix.analysis.paths import PathMeasures
from acmix.config import PrecisionConfig
from acmix.engine.evaluate import batch_sums
from acmix.engine.forward import autocast, network_inputs
from acmix.process.distributed import Distributed

if TYPE_CHECKING:
    from acmix.data.loader import ValLoader


def report_paths(
    model: nn.Module, loader: "ValLoader", dist: Distributed, precision: PrecisionConfig, images: int | None = None
) -> dict[str, list[dict[str, Any]]]:
    """`paths`: a row of measures for each ACmix block; `lesions`: a row for each path silenced. All ranks together.

    Args:
        model: a bare network; both lists are empty for one without ACmix blocks.
        loader: this rank's share of the validation images.
        dist, precision: as of `evaluate`.
        images: measure with about that many, evenly spaced over the validation set; None: with all.

    The images are read twice: silencing a path by its mean needs that mean first.
    """
    lesions = lesions_of(model)
    if not lesions:
        return {"paths": [], "lesions": []}
    judge = _Judge(model, loader, dist, precision, images)
    measures, unhurt = judge.measure()
    means = {name: sums.mean_outputs() for name, sums in measures.blocks.items()}
    scores = judge.hurt(lesions, means)
    return {"paths": measures.rows(), "lesions": lesion_rows(lesions, scores, *unhurt)}


class _Judge:
    """Runs a network over the validation images, whole and hurt."""

    def __init__(
        self,
        model: nn.Module,
        loader: "ValLoader",
        dist: Distributed,
        precision: PrecisionConfig,
        images: int | None,
    ) -> None:
        self.model, self.loader, self.dist, self.precision = model, loader, dist, precision
        self.images = images
        count = len(loader) if images is None else min(images, len(loader))
        self.rounds = -(-count // (loader.batch_size * dist.world_size))  # of the rank with the most images

    def measure(self) -> tuple[PathMeasures, tuple[float, float]]:
        """The measures over all images, and the whole network's top-1 and loss."""
        measures = PathMeasures(self.model)
        scores = torch.zeros(4, dtype=torch.float64, device=self.dist.device)
        for inputs in self._rounds("paths"):
            if inputs is not None:
                with measuring(self.model), torch.no_grad(), autocast(self.precision, self.dist.device):
                    logits = measures.add(inputs[0])
                scores += batch_sums(logits.float(), inputs[1])
        for sums in measures.blocks.values():
            sums.load(self.dist.all_reduce(sums.vector()))
        (score,) = self._scores(scores[None])
        return measures, score

    def hurt(self, lesions: list[Lesion], means: Means) -> list[tuple[float, float]]:
        """Top-1 and loss under each lesion."""
        scores = torch.zeros(len(lesions), 4, dtype=torch.float64, device=self.dist.device)
        for inputs in self._rounds("lesions"):
            for score, lesion in zip(scores, lesions, strict=True):
                self.dist.watchdog.tick(0, "lesions")
                if inputs is not None:
                    score += self._hurt_once(lesion, means, *inputs)
        return self._scores(scores)

    def _hurt_once(self, lesion: Lesion, means: Means, images: Tensor, targets: Tensor) -> Tensor:
        with (
            measuring(self.model),
            lesioned(lesion, means),
            torch.inference_mode(),
            autocast(self.precision, self.dist.device),
        ):
            logits = self.model(images)
        return batch_sums(logits.float(), targets)

    def _rounds(self, what: str) -> Iterator[tuple[Tensor, Tensor] | None]:
        """Images and targets of each batch, on the device; None where other ranks have one more; rank 0 shows a bar."""
        loader, dist = self.loader, self.dist
        batches = iter(loader) if self.images is None else loader.spread(self.images, dist.rank, dist.world_size)
        silent = None if self.dist.is_main else True  # None: shown on a terminal only
        for _ in tqdm(range(self.rounds), what, disable=silent, leave=False):
            self.dist.watchdog.tick(0, what)
            batch = next(batches, None)
            yield None if batch is None else network_inputs(batch, self.precision, self.dist.device)

    def _scores(self, sums: Tensor) -> list[tuple[float, float]]:
        """Top-1 in percent and loss from sums (lesions, 4) of each rank."""
        total = self.dist.all_reduce(sums.cpu())
        count = total[:, 3].clamp(min=1)
        return list(zip((100 * total[:, 1] / count).tolist(), (total[:, 0] / count).tolist(), strict=True))
