"""What a run will do and need, from one real step: the answer of `--dry-run`."""

from copy import deepcopy
from typing import TYPE_CHECKING

from acmix.config import Config
from acmix.engine.learner import Learner
from acmix.engine.optim import peak_lr
from acmix.layers.mix import path_weights
from acmix.telemetry.flops import multiply_adds
from acmix.telemetry.memory import SavedActivations, step_memory

if TYPE_CHECKING:
    from acmix.data.loader import Data


def plan(config: Config, learner: Learner, data: "Data") -> list[str]:
    """Run one step (on every rank alike) and describe the run in lines: model, data, schedule, memory."""
    loader, schedule = data.train, config.schedule
    updates = loader.updates_per_epoch
    batch = next(iter(loader.epoch(0)))[0]
    with SavedActivations(learner.model) as saved:
        loss = learner.loss(batch, 1)
    learner.scaler.scale(loss).backward()
    learner.update(1)
    memory = step_memory(learner.model, learner.optimizer, saved.bytes)
    macs = multiply_adds(deepcopy(learner.model), tuple(batch.images.shape[1:]))  # a copy is never a compiled one
    total = min(schedule.epochs * updates, schedule.steps or schedule.epochs * updates)
    lr = peak_lr(config.optimizer, loader.global_batch)
    warmup = f", {schedule.warmup_epochs:g} warm-up epochs" if schedule.warmup_epochs else ""
    stop = f", stopped after {schedule.steps:,}" if schedule.steps else ""
    return [
        f"model      {config.model.name}: {learner.parameters / 1e6:.2f} M parameters, {macs / 1e9:.3f} G multiply-"
        f"adds per image, {len(path_weights(learner.model))} path weights",
        f"data       {config.data.dataset}: {len(data.classes)} classes, {updates * loader.global_batch:,} training "
        f"images per epoch at {' × '.join(map(str, dict.fromkeys(config.data.size)))} px",
        f"update     {loader.global_batch} images: {config.data.batch_size} per process × {learner.dist.world_size} "
        f"process(es) × {config.optimizer.accumulate} accumulated",
        f"steps      {total:,}: {schedule.epochs} epochs × {updates:,} updates{stop}",
        f"optimizer  {config.optimizer.name}, {schedule.name} schedule, lr {lr:g} to {schedule.min_lr:g}{warmup}",
        f"precision  amp {config.precision.amp} on {learner.dist.device}",
        f"memory     at least {memory} per process",
    ]
