"""Small folders of real image files, and configs that read them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from acmix.config import Config

MakeFolder = Callable[..., Path]
MakeConfig = Callable[..., Config]


@pytest.fixture(scope="session")
def make_folder() -> MakeFolder:
    """Write `root/train/CLASS/NNN.png` and `root/val/CLASS/NNN.png` of noise, every image another one."""

    def make(
        root: Path, train: int = 12, val: int = 5, classes: tuple[str, ...] = ("cat", "dog"), size: int = 16
    ) -> Path:
        random = np.random.default_rng(len(classes))
        for split, count in (("train", train), ("val", val)):
            for number in range(count):
                folder = root / split / classes[number % len(classes)]
                folder.mkdir(parents=True, exist_ok=True)
                pixels = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number:03}.png")
        return root

    return make


@pytest.fixture(scope="session")
def make_config() -> MakeConfig:
    """A config from `section__key=value` arguments; 16 px, loader processes, no augmentation but what is asked for."""

    def make(**settings: Any) -> Config:
        values: dict[str, dict[str, Any]] = {
            "model": {"name": "none"},
            "data": {"dataset": "digits", "image_size": 16, "batch_size": 4, "num_workers": 0, "loader": "workers"},
            "schedule": {"epochs": 1},
        }
        for name, value in settings.items():
            section, _, key = name.partition("__")
            values.setdefault(section, {})[key] = str(value) if isinstance(value, Path) else value
        return Config.model_validate(values)

    return make
