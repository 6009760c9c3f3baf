"""Optimizer and learning-rate schedule, both timm's; the parameter groups know about path weights."""

import inspect
from difflib import get_close_matches
from typing import Any

import torch
from timm.optim import (
    create_optimizer_v2,
    get_optimizer_class,
    list_optimizers,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from acmix.config import OptimizerConfig, ScheduleConfig
from acmix.errors import UserError
from acmix.layers.mix import path_weights


def peak_lr(config: OptimizerConfig, global_batch: int) -> float:
    """The learning rate at the peak: `optimizer.lr`, scaled linearly to the global batch where `lr_batch` is set."""
    return config.lr if config.lr_batch is None else config.lr * global_batch / config.lr_batch


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """timm's groups (no decay for norms and biases, layer decay), with the path weights in groups of their own.

    Path weights are never decayed; their `lr_scale` carries `optimizer.path_lr_factor`.
    """
    spared = set(getattr(model, "no_weight_decay", set)())
    if config.layer_decay is not None:
        groups = param_groups_layer_decay(model, config.weight_decay, spared, layer_decay=config.layer_decay)
    else:
        groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=spared)
    mine = {id(parameter) for parameter in path_weights(model).values()}
    rest: list[dict[str, Any]] = []
    paths: list[dict[str, Any]] = []
    for group in groups:
        chosen = [parameter for parameter in group["params"] if id(parameter) in mine]
        others = [parameter for parameter in group["params"] if id(parameter) not in mine]
        if others:
            rest.append({**group, "params": others})
        if chosen:
            lr_scale = group.get("lr_scale", 1.0) * config.path_lr_factor
            paths.append({**group, "params": chosen, "weight_decay": 0.0, "lr_scale": lr_scale})
    return rest + paths


def build_optimizer(model: nn.Module, config: OptimizerConfig, global_batch: int) -> torch.optim.Optimizer:
    """The timm optimizer of the config.

    Raises UserError for a name timm does not know (with the nearest one) and for `betas` or `eps` where the
    optimizer has none.
    """
    if config.name.lower() not in list_optimizers():
        nearest = get_close_matches(config.name.lower(), list_optimizers(), n=1, cutoff=0.0)[0]
        raise UserError(f"optimizer.name: timm has no optimizer {config.name!r}; did you mean {nearest}?")
    extra = {key: value for key in ("betas", "eps") if (value := getattr(config, key)) is not None}
    accepted = inspect.signature(get_optimizer_class(config.name, bind_defaults=False)).parameters
    for key in extra:
        if key not in accepted:
            raise UserError(f"optimizer.{key}: the optimizer {config.name} has no {key}; leave it out")
    return create_optimizer_v2(
        model,
        opt=config.name,
        lr=peak_lr(config, global_batch),
        momentum=config.momentum,
        param_group_fn=lambda module: parameter_groups(module, config),
        **extra,
    )


def build_scheduler(optimizer: torch.optim.Optimizer, config: ScheduleConfig, updates_per_epoch: int) -> Scheduler:
    """timm's schedule, stepped per update: `step_update(n)` sets the learning rate that update n + 1 uses.

    It holds no state of its own: the rate follows from the number of updates alone.
    """
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=config.name,
        num_epochs=config.epochs,
        warmup_epochs=config.warmup_epochs,  # type: ignore[arg-type]  # timm multiplies it; a fraction is fine
        warmup_lr=config.warmup_lr,
        min_lr=config.min_lr,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    return scheduler
