"""Keys that are each valid and yet do not fit together."""

import json
from collections.abc import Iterator

from acmix.config.datasets import find_dataset
from acmix.config.schema import Config, ScheduleConfig
from acmix.config.yaml import KeyPath
from acmix.errors import UserError

_OWN_KEYS = {"name": "model.name", "num_classes": "model.num_classes", "image_size": "data.image_size"}
"""Arguments of acmix.models.create_model that the config gives under another key."""


def contradictions(config: Config) -> list[tuple[KeyPath, str]]:
    """The key path of each contradiction in a config, and what is wrong."""
    data, augment, schedule, optimizer = config.data, config.augment, config.schedule, config.optimizer
    found: list[tuple[KeyPath, str]] = []
    try:
        dataset = find_dataset(data.dataset)
    except UserError as error:
        return [(("data", "dataset"), str(error))]
    for name, own in _OWN_KEYS.items():
        if name in config.model.kwargs:
            found.append((("model", "kwargs", name), f"has a key of its own: {own}"))
    if type(channels := config.model.in_chans) is not int or channels not in (1, 3):
        text = f"{channels!r} channels: images are read as RGB, 3 channels, or as grey, 1; choose one of the two"
        found.append((("model", "kwargs", "in_chans"), text))
    if schedule.warmup_epochs > schedule.epochs:
        text = f"{schedule.warmup_epochs:g} is more than schedule.epochs, {schedule.epochs}"
        found.append((("schedule", "warmup_epochs"), text))
    if optimizer.lr_batch is None:  # else the images of an update decide, see acmix.engine.optim.refuse_rates
        found += rates_above_peak(schedule, optimizer.lr, f"optimizer.lr, {optimizer.lr:g}")
    if data.root is None and dataset.needs_root:
        found.append((("data", "root"), f"is required for the dataset {data.dataset}: the folder that holds the data"))
    if data.download and not dataset.can_download:
        found.append((("data", "download"), f"the dataset {data.dataset} cannot be downloaded; set it to false"))
    if data.classes is not None and data.class_order is not None:
        found.append(
            (("data", "class_order"), f"data.classes, {data.classes}, gives the order already; keep one of them")
        )
    if data.labels and dataset.name != "folder":
        found.append((("data", "labels"), f"is for the dataset folder; {data.dataset} holds the classes of its images"))
    weights, classes = config.loss.class_weights, config.model.num_classes
    if isinstance(weights, tuple) and classes is not None and len(weights) != classes:
        found.append((("loss", "class_weights"), f"{len(weights)} weights for {classes} classes (model.num_classes)"))
    found += _without_effect(config)
    for name, (low, high) in (("scale", augment.scale), ("ratio", augment.ratio)):
        if low > high:
            found.append((("augment", name), f"the smallest, {low:g}, is above the largest, {high:g}"))
    if augment.scale[1] > 1:
        found.append((("augment", "scale"), f"{augment.scale[1]:g} is more than 1, the whole image"))
    if (augment.mixup or augment.cutmix) and data.batch_size % 2:
        text = f"{data.batch_size} is odd, but augment.mixup and augment.cutmix mix pairs; use an even number"
        found.append((("data", "batch_size"), text))
    return found


def _without_effect(config: Config) -> Iterator[tuple[KeyPath, str]]:
    """Keys that were set, though the key that they depend on leaves them without effect."""
    augment, optimizer, epochs = config.augment, config.optimizer, config.schedule.epochs
    depend = [
        ("run.min_delta", config.run.min_delta, "run.patience", config.run.patience),
        ("optimizer.clip_mode", optimizer.clip_mode != "norm", "optimizer.clip_grad", optimizer.clip_grad),
        ("ema.warmup", config.ema.warmup, "ema.decay", config.ema.decay is not None),
        ("precision.compile_cache", config.precision.compile_cache, "precision.compile", config.precision.compile),
        ("augment.mixup", augment.mixup, "augment.mixup_prob", augment.mixup_prob),
        ("augment.cutmix", augment.cutmix, "augment.mixup_prob", augment.mixup_prob),
    ]
    for key, is_set, other, is_on in depend:
        if is_set and not is_on:
            section, name = other.split(".")
            off = json.dumps(getattr(getattr(config, section), name))
            yield tuple(key.split(".")), f"counts only with {other}, which is {off}; set it, or leave this out"
    if optimizer.path_freeze_epochs >= epochs:
        text = f"{optimizer.path_freeze_epochs:g} is all of schedule.epochs, {epochs}: the path weights never move"
        yield ("optimizer", "path_freeze_epochs"), text


def rates_above_peak(schedule: ScheduleConfig, peak: float, told: str) -> list[tuple[KeyPath, str]]:
    """The key path of each rate of the schedule that is above its peak, and what is wrong; `told` names the peak."""
    rates = {"min_lr": schedule.min_lr} | ({"warmup_lr": schedule.warmup_lr} if schedule.warmup_epochs else {})
    text = "is above the peak of the schedule"
    return [(("schedule", key), f"{rate:g} {text}, {told}") for key, rate in rates.items() if rate > peak]
