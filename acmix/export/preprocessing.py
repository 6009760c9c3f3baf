"""How an image becomes a network's input, exactly as in validation, carried along by an exported file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from acmix.config import Config
from acmix.data.datasets import Statistics, statistics_of
from acmix.data.transforms import Transform, build_val_transform, kept_share


@dataclass(frozen=True)
class Preprocessing:
    """What validation does to an image: resize until the crop fits, crop the centre, normalise.

    size: (height, width) of the input; mean, std: of the channels in 0..1, three, or one for grey; interpolation: as in
    the `data` section of a config; crop_pct: the share of the resized image that the crop keeps, 1 for small inputs.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float

    @classmethod
    def of(cls, config: Config) -> "Preprocessing":
        """That of a run."""
        data, statistics = config.data, statistics_of(config.data, config.model.in_chans)
        return cls(data.size, statistics.mean, statistics.std, data.interpolation, kept_share(config))

    def transform(self) -> Transform:
        """RGB image of any size → (C, H, W) float32, normalised."""
        config = Config.model_validate(
            {
                "model": {"name": "exported", "kwargs": {"in_chans": len(self.mean)}},
                "data": {
                    "dataset": "folder",
                    "image_size": self.size,
                    "interpolation": self.interpolation,
                    "crop_pct": self.crop_pct,
                },
                "schedule": {"epochs": 1},
            }
        )
        return build_val_transform(config, Statistics(self.mean, self.std))

    def metadata(self) -> dict[str, str]:
        """Name → JSON, for the metadata of a file."""
        return {name: json.dumps(value) for name, value in vars(self).items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> "Preprocessing":
        """What `metadata` was made from. Raises KeyError or ValueError for a file without it."""
        values: dict[str, Any] = {name: json.loads(metadata[name]) for name in cls.__dataclass_fields__}
        tuples = {name: tuple(values[name]) for name in ("size", "mean", "std")}
        return cls(**(values | tuples))
