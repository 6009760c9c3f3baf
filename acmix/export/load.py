"""A trained network behind a run, a checkpoint or a weights file, as evaluation finds it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from acmix import models
from acmix.checkpoint.weights import Kind, load_weights, pick_weights
from acmix.config import Config, load_config
from acmix.engine.proof import prove
from acmix.engine.run_folder import find_config, trained_classes
from acmix.errors import UserError
from acmix.process.distributed import Distributed
from acmix.process.environment import set_up_torch


@dataclass(frozen=True)
class Trained:
    """A network in evaluation mode, on the device of `dist`, with the config and classes that it was trained for."""

    path: Path
    config: Config
    model: nn.Module
    classes: list[str]
    dist: Distributed


def build_network(config: Config, classes: int, weights: dict[str, Tensor], path: Path) -> nn.Module:
    """The network of a config with these weights, ours or the authors', strictly; `path` is where they are from.

    Raises UserError for a name or arguments that make no network, and for weights that do not fit it.
    """
    kwargs: dict[str, Any] = config.model.kwargs | {"image_size": config.data.size, "pretrained": False}
    model = models.create_model(config.model.name, classes, **kwargs)
    load_weights(model, weights, str(path), models.load_official)
    return model


def load_trained(
    checkpoint: str, config_file: str | None = None, weights: Kind = "auto", overrides: Sequence[str] = ()
) -> Trained:
    """Load what `eval.py` would evaluate, without opening its data.

    Args:
        checkpoint: A run folder, a checkpoint or a weights file.
        config_file: Its config; None: that of the run that it lies in.
        weights: `ema`, `raw`, or `auto`: ema where there is one.
        overrides: KEY.PATH=VALUE, as on the command line.

    Raises:
        UserError: for what cannot be found, does not fit together, or does not say how many classes it has.
    """
    path, config_path = find_config(checkpoint, config_file)
    config = load_config(config_path, overrides)
    picked = pick_weights(path, weights)
    classes = picked.classes or trained_classes(path)
    if classes is None:
        if config.model.num_classes is None:
            raise UserError(f"--checkpoint {path}: does not say how many classes it has; give model.num_classes=N")
        classes = [str(number) for number in range(config.model.num_classes)]
    dist = Distributed.start(config.run)
    set_up_torch(config.run, dist.device)
    model = build_network(config, len(classes), picked.weights, path)
    prove(model, config, len(classes), dist)
    return Trained(path, config, model.eval(), classes, dist)
