"""Optimizer and learning-rate schedule, both timm's; the parameter groups know about path weights."""

import inspect
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from timm.optim import (
    create_optimizer_v2,
    get_optimizer_class,
    get_optimizer_info,
    list_optimizers,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from timm.scheduler import CosineLRScheduler, PolyLRScheduler, TanhLRScheduler, create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from acmix.config import OptimizerConfig, ScheduleConfig
from acmix.config.contradictions import rates_above_peak
from acmix.engine.kwargs import checked_kwargs
from acmix.errors import UserError
from acmix.layers.mix import path_weights

_SCHEDULES = {"cosine": CosineLRScheduler, "tanh": TanhLRScheduler, "poly": PolyLRScheduler}
_NAMES_IN_CLASS = {"noise": "noise_range_t", "decay_rate": "power"}
"""Arguments of timm's schedule factory that its classes call otherwise."""


def peak_lr(config: OptimizerConfig, global_batch: int) -> float:
    """The learning rate at the peak: `optimizer.lr`, scaled linearly to the global batch where `lr_batch` is set."""
    return config.lr if config.lr_batch is None else config.lr * global_batch / config.lr_batch


def refuse_rates(optimizer: OptimizerConfig, schedule: ScheduleConfig, global_batch: int) -> None:
    """UserError for a rate of the schedule that is above the peak, which `optimizer.lr_batch` has scaled."""
    peak = peak_lr(optimizer, global_batch)
    told = (
        f"{peak:g}: that is optimizer.lr, {optimizer.lr:g}, for optimizer.lr_batch, {optimizer.lr_batch}, scaled to "
        f"{global_batch} images an update; lower the one or raise the other"
    )
    problems = rates_above_peak(schedule, peak * (1 + 1e-9), told)  # not the rounding of the scale
    if problems:
        raise UserError("\n".join(f"{'.'.join(map(str, key_path))}: {text}" for key_path, text in problems))


def parameter_groups(model: nn.Module, config: OptimizerConfig, new: Collection[str] = ()) -> list[dict[str, Any]]:
    """timm's groups (no decay for norms and biases, layer decay), with the path weights in groups of their own.

    Path weights have a decay of their own, `optimizer.path_weight_decay`; their `lr_scale` carries
    `optimizer.path_lr_factor`. With `optimizer.new_lr_factor` the parameters named in `new` are in groups of their own
    too, whose `lr_scale` carries it.

    Raises UserError where that factor is set and none of the parameters is new.
    """
    spared = set(getattr(model, "no_weight_decay", set)())
    if config.layer_decay is not None:
        groups = param_groups_layer_decay(model, config.weight_decay, spared, layer_decay=config.layer_decay)
    else:
        groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=spared)
    paths = {id(parameter) for parameter in path_weights(model).values()}
    groups = _set_apart(groups, paths, config.path_lr_factor, weight_decay=config.path_weight_decay)
    if config.new_lr_factor is None:
        return groups
    young = {id(parameter) for name, parameter in model.named_parameters() if name in new}
    if not young:
        raise UserError(
            "optimizer.new_lr_factor: nothing in this network is known to be new; give a file of scripts/grow.py as "
            "model.checkpoint, or leave the factor out"
        )
    return _set_apart(groups, young, config.new_lr_factor)


def _set_apart(
    groups: list[dict[str, Any]], chosen: Collection[int], lr_factor: float, **changes: Any
) -> list[dict[str, Any]]:
    """The groups with the parameters of these ids in groups of their own, after the others, with their `lr_scale`."""
    rest: list[dict[str, Any]] = []
    apart: list[dict[str, Any]] = []
    for group in groups:
        inside = [parameter for parameter in group["params"] if id(parameter) in chosen]
        outside = [parameter for parameter in group["params"] if id(parameter) not in chosen]
        if outside:
            rest.append({**group, "params": outside})
        if inside:
            lr_scale = group.get("lr_scale", 1.0) * lr_factor
            apart.append({**group, **changes, "params": inside, "lr_scale": lr_scale})
    return rest + apart


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, global_batch: int, new: Collection[str] = ()
) -> torch.optim.Optimizer:
    """The timm optimizer of the config; `new` as for `parameter_groups`.

    Raises UserError for a name timm does not know (with the nearest one), for an optimizer that needs second
    derivatives, for `betas`, `eps` or `kwargs` that the optimizer does not take, and for values that it refuses or
    that fail at its first step, which is tried on a parameter of its own.
    """
    if config.name.lower() not in list_optimizers():
        nearest = get_close_matches(config.name.lower(), list_optimizers(), n=1, cutoff=0.0)[0]
        raise UserError(f"optimizer.name: timm has no optimizer {config.name!r}; did you mean {nearest}?")
    if get_optimizer_info(config.name.lower()).second_order:
        raise UserError(
            f"optimizer.name: {config.name} needs second derivatives, which training does not take; choose another, "
            "such as adamw"
        )
    try:
        arguments = _arguments(config, peak_lr(config, global_batch))
        optimizer = create_optimizer_v2(
            model, param_group_fn=lambda net: parameter_groups(net, config, new), **arguments
        )
        _state_after_step(torch.ones(2, 2, device=next(model.parameters()).device), arguments)
    except (ArithmeticError, AssertionError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
        where = "optimizer.kwargs" if config.kwargs else "optimizer"
        raise UserError(f"{where}: {config.name} cannot work with these values: {error}") from error
    return optimizer


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    config: OptimizerConfig,
    state: dict[str, Any],
    groups: Sequence[Mapping[str, Any]],
) -> None:
    """Load a checkpoint's state into the optimizer of `config`, which keeps what its config says now.

    Each parameter group keeps the entries that the config determines: those of `groups`, the groups that the optimizer
    was built from, and those named like an argument of its constructor. The rest is what the optimizer evolves, such as
    a count of steps, and comes from the checkpoint; so does the learning rate, which the schedule sets at every step.

    Raises ValueError or KeyError when the state is of another network, or lacks what the optimizer needs.
    """
    own = {key for group in groups for key in group} | inspect.signature(type(optimizer)).parameters.keys()
    kept = (own | {"initial_lr"}) - {"params", "lr"}
    saved_groups = state["param_groups"]
    if len(saved_groups) != len(optimizer.param_groups):
        raise ValueError(f"its parameters are in {len(saved_groups)} groups, now in {len(optimizer.param_groups)}")
    if any(len(a["params"]) != len(b["params"]) for a, b in zip(saved_groups, optimizer.param_groups, strict=True)):
        raise ValueError("its parameters are in groups of other sizes")
    merged = [
        {key: value for key, value in saved.items() if key not in kept}
        | {key: value for key, value in group.items() if key in kept}
        for saved, group in zip(saved_groups, optimizer.param_groups, strict=True)
    ]
    _refuse_incomplete_state(config, state["state"], optimizer)
    optimizer.load_state_dict({**state, "param_groups": merged})


def build_scheduler(optimizer: torch.optim.Optimizer, config: ScheduleConfig, updates_per_epoch: int) -> Scheduler:
    """timm's schedule, advanced by every step: `step_update(n)` sets the learning rate of step n + 1.

    It holds no state of its own: the rate follows from the number of the step alone. Raises UserError for `kwargs`
    that the schedule does not take.
    """
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=config.name,
            num_epochs=config.epochs,
            warmup_epochs=config.warmup_epochs,  # type: ignore[arg-type]  # timm multiplies it; a fraction is fine
            warmup_lr=config.warmup_lr,
            min_lr=config.min_lr,
            step_on_epochs=False,
            updates_per_epoch=updates_per_epoch,
            **checked_kwargs("schedule", config, _schedule_arguments(config.name)),
        )
        if config.kwargs:  # some that do not fit fail only when a rate is asked for
            for step in (config.epochs * updates_per_epoch - 1, 0):
                scheduler.step_update(step)
    except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"schedule.kwargs: {config.name} cannot work with these values: {error}") from error
    return scheduler


def _arguments(config: OptimizerConfig, lr: float) -> dict[str, Any]:
    """The arguments of timm's factory for the optimizer of the config."""
    accepted = inspect.signature(get_optimizer_class(config.name, bind_defaults=False)).parameters
    return {
        "opt": config.name,
        "lr": lr,
        "momentum": config.momentum,
        **_betas_and_eps(config, accepted),
        **checked_kwargs("optimizer", config, {key: accepted[key] for key in accepted if key != "params"}),
    }


def _state_after_step(values: Tensor, arguments: dict[str, Any]) -> dict[str, Any]:
    """What the optimizer keeps of a parameter with these values after its first step."""
    parameter = nn.Parameter(values.clone())
    parameter.grad = torch.ones_like(parameter)
    optimizer = create_optimizer_v2([parameter], **arguments)
    optimizer.step()
    return dict(optimizer.state[parameter])


def _refuse_incomplete_state(
    config: OptimizerConfig, saved: Mapping[int, Mapping[str, Any]], optimizer: torch.optim.Optimizer
) -> None:
    """ValueError when a saved state lacks an entry that the optimizer reads, or has one of another shape.

    The optimizer would miss it only at its next step. One parameter of each kind of saved state is tried, the smallest.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    smallest: dict[frozenset[str], int] = {}
    for index in sorted((index for index in saved if saved[index]), key=lambda index: parameters[index].numel()):
        smallest.setdefault(frozenset(saved[index]), index)
    for names, index in smallest.items():
        for name, value in _state_after_step(parameters[index].detach(), _arguments(config, 1.0)).items():
            if value is not None and name not in names:
                raise ValueError(f"the optimizer's state has no {name!r}, which {config.name} needs as it is now")
            old = saved[index].get(name)
            if isinstance(value, Tensor) and isinstance(old, Tensor) and value.shape != old.shape:
                raise ValueError(f"the optimizer's {name!r} has another shape than {config.name} needs as it is now")


def _betas_and_eps(config: OptimizerConfig, accepted: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    given = {key: value for key in ("betas", "eps") if (value := getattr(config, key)) is not None}
    for key in given:
        if key not in accepted:
            raise UserError(f"optimizer.{key}: the optimizer {config.name} has no {key}; leave it out")
    own = accepted["betas"].default if "betas" in given else None
    if isinstance(own, tuple) and len(given["betas"]) != len(own):
        raise UserError(
            f"optimizer.betas: {len(given['betas'])} given, but {config.name} has {len(own)}, such as {list(own)}"
        )
    return given


def _schedule_arguments(name: str) -> dict[str, inspect.Parameter]:
    """The arguments of timm's factory that the schedule `name` makes use of."""
    factory = inspect.signature(create_scheduler_v2).parameters
    used = inspect.signature(_SCHEDULES[name]).parameters
    return {key: factory[key] for key in factory if _NAMES_IN_CLASS.get(key, key) in used and key != "optimizer"}
