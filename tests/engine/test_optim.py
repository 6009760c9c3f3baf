"""Parameter groups, learning rates and the schedule."""

import math

import pytest
import timm
import torch
from torch import nn

from acmix import models
from acmix.config import OptimizerConfig, ScheduleConfig
from acmix.engine.optim import build_optimizer, build_scheduler, parameter_groups, peak_lr, refuse_rates
from acmix.errors import UserError
from acmix.layers import path_weights


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return models.create_model("acmix_resnet26", num_classes=4, stem="cifar", base_width=8)


def group_of(model: nn.Module, config: OptimizerConfig) -> dict[str, dict]:
    """Parameter name → its group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, config)
    return {names[id(parameter)]: group for group in groups for parameter in group["params"]}


@pytest.mark.parametrize("layer_decay", [None, 0.8])
def test_every_parameter_is_in_one_group_and_only_matrices_decay(network: nn.Module, layer_decay: float | None) -> None:
    config = OptimizerConfig(weight_decay=0.05, layer_decay=layer_decay)
    groups = parameter_groups(network, config)
    listed = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(listed) == len(set(listed)) == len(list(network.parameters()))
    for name, group in group_of(network, config).items():
        parameter = network.get_parameter(name)
        if parameter.ndim <= 1 or name.endswith(".bias") or name in path_weights(network):
            assert group["weight_decay"] == 0.0, name


def test_path_weights_never_decay_and_have_their_own_rate(network: nn.Module) -> None:
    config = OptimizerConfig(lr=0.1, weight_decay=0.5, path_lr_factor=0.25)
    names = path_weights(network)
    assert len(names) == 16
    optimizer = build_optimizer(network, config, global_batch=8)
    build_scheduler(optimizer, ScheduleConfig(epochs=2), updates_per_epoch=5).step_update(0)
    mine = {id(network.get_parameter(name)) for name in names}
    for group in optimizer.param_groups:
        paths = {id(parameter) in mine for parameter in group["params"]}
        assert len(paths) == 1
        assert group["lr"] == pytest.approx(0.025 if paths == {True} else 0.1)
        if paths == {True}:
            assert group["weight_decay"] == 0.0


@pytest.mark.parametrize("key", ["min_lr", "warmup_lr"])
def test_a_rate_above_the_scaled_peak_is_refused_naming_both(key: str) -> None:
    optimizer = OptimizerConfig(lr=0.1, lr_batch=100)
    schedule = ScheduleConfig(epochs=2, warmup_epochs=1.0, **{key: 0.03})
    refuse_rates(optimizer, schedule, 30)
    with pytest.raises(UserError, match=rf"schedule\.{key}: 0\.03 is above .*0\.029: .*optimizer\.lr_batch, 100, .*29"):
        refuse_rates(optimizer, schedule, 29)


def test_layer_decay_lowers_the_rate_towards_the_input(network: nn.Module) -> None:
    groups = group_of(network, OptimizerConfig(layer_decay=0.5, path_lr_factor=2.0))
    scales = [groups[name]["lr_scale"] for name in ("conv1.weight", "layer2.0.conv1.weight", "fc.weight")]
    assert scales == sorted(scales)
    assert scales[0] < scales[-1] == 1.0
    alpha, neighbour = groups["layer4.0.acmix.mix.alpha"], groups["layer4.0.acmix.qkv.weight"]
    assert alpha["lr_scale"] == pytest.approx(2.0 * neighbour["lr_scale"])


def test_rate_scales_linearly_with_the_global_batch_where_asked() -> None:
    assert peak_lr(OptimizerConfig(lr=0.1), global_batch=1024) == 0.1
    assert peak_lr(OptimizerConfig(lr=0.1, lr_batch=256), global_batch=1024) == pytest.approx(0.4)


def test_schedule_warms_up_per_update_then_follows_the_cosine() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    config = ScheduleConfig(epochs=10, warmup_epochs=0.5, warmup_lr=0.2, min_lr=0.1)
    scheduler = build_scheduler(optimizer, config, updates_per_epoch=4)
    rates = []
    for update in range(40):
        scheduler.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[:2] == pytest.approx([0.2, 0.6])
    expected = [0.1 + 0.45 * (1 + math.cos(math.pi * update / 40)) for update in range(2, 40)]
    assert rates[2:] == pytest.approx(expected)


def test_schedule_depends_on_the_number_of_updates_alone() -> None:
    def rate_at(updates: list[int]) -> float:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = build_scheduler(optimizer, ScheduleConfig(epochs=3, warmup_epochs=1), updates_per_epoch=7)
        for update in updates:
            scheduler.step_update(update)
        return float(optimizer.param_groups[0]["lr"])

    assert rate_at(list(range(14))) == rate_at([13])


@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw", "lamb"])
def test_named_optimizer_takes_a_step(name: str) -> None:
    model = timm.create_model("test_resnet", num_classes=2)
    optimizer = build_optimizer(model, OptimizerConfig(name=name, lr=0.1), global_batch=4)
    before = model.get_parameter("conv1.0.weight").clone() if hasattr(model, "conv1") else None
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    assert before is None or not torch.equal(before, model.get_parameter("conv1.0.weight"))


def test_unknown_optimizer_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match=r"optimizer\.name.*'sdg'.*did you mean sgd\?"):
        build_optimizer(nn.Linear(2, 2), OptimizerConfig(name="sdg"), global_batch=4)


def test_betas_are_refused_where_the_optimizer_has_none() -> None:
    with pytest.raises(UserError, match=r"optimizer\.betas: the optimizer sgd has no betas"):
        build_optimizer(nn.Linear(2, 2), OptimizerConfig(name="sgd", betas=(0.9, 0.99)), global_batch=4)


@pytest.mark.parametrize(
    ("name", "betas", "message"),
    [
        ("adabelief", (0.9, 0.99, 0.9), r"optimizer\.betas: 3 given, but adabelief has 2, such as \[0\.9, 0\.999\]"),
        ("adamw", (0.9, 0.99, 0.9), r"optimizer\.betas: 3 given, but adamw has 2"),
        ("adan", (0.9, 0.99), r"optimizer\.betas: 2 given, but adan has 3"),
        ("adahessian", None, r"optimizer\.name: adahessian needs second derivatives"),
    ],
)
def test_an_optimizer_that_cannot_take_a_step_is_refused(
    name: str, betas: tuple[float, ...] | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        build_optimizer(nn.Linear(2, 2), OptimizerConfig(name=name, betas=betas), global_batch=4)


def test_kwargs_reach_the_optimizer_with_lists_as_tuples() -> None:
    config = OptimizerConfig(name="cmars", kwargs={"gamma": 0.5, "betas_1d": [0.8, 0.9]})
    group = build_optimizer(nn.Linear(2, 2), config, global_batch=4).param_groups[0]
    assert (group["gamma"], group["betas_1d"]) == (0.5, (0.8, 0.9))


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        (
            "sgd",
            {"nestrov": True},
            ".nestrov: sgd takes no such argument; nearest valid key: optimizer.kwargs.nesterov",
        ),
        ("sgd", {"params": []}, ".params: sgd takes no such argument"),
        ("sgd", {"lr": 1.0}, ".lr: has a key of its own: optimizer.lr"),
        ("adamw", {"betas": [0.9, 0.99]}, ".betas: has a key of its own: optimizer.betas"),
        ("sgd", {"nesterov": "yes"}, ".nesterov: 'yes' does not fit sgd: Input should be a valid boolean"),
        ("sgdp", {"nesterov": 1}, ".nesterov: 1 does not fit sgdp"),  # has no annotation, only a default
        ("adamw", {"fused": True, "foreach": True}, ": adamw cannot work with these values: `fused` and `foreach`"),
        ("adamw", {"capturable": True}, ": adamw cannot work with these values: "),  # on a CPU fails at a step
    ],
)
def test_optimizer_kwargs_that_do_not_fit_are_refused_by_key(name: str, kwargs: dict, message: str) -> None:
    with pytest.raises(UserError) as caught:
        build_optimizer(nn.Linear(2, 2), OptimizerConfig(name=name, kwargs=kwargs), global_batch=4)
    assert str(caught.value).startswith(f"optimizer.kwargs{message}")


def test_kwargs_reach_the_schedule() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    config = ScheduleConfig(name="poly", epochs=10, kwargs={"decay_rate": 2})
    scheduler = build_scheduler(optimizer, config, updates_per_epoch=4)
    rates = []
    for update in range(40):
        scheduler.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([(1 - update / 40) ** 2 for update in range(40)])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"kdecay": 2}, ".kdecay: cosine takes no such argument; nearest valid key: schedule.kwargs.k_decay"),
        ({"decay_rate": 2}, ".decay_rate: cosine takes no such argument"),  # timm's factory takes and ignores it
        ({"warmup_epochs": 1}, ".warmup_epochs: has a key of its own: schedule.warmup_epochs"),
        ({"num_epochs": 1}, ".num_epochs: has a key of its own: schedule.epochs"),
        ({"cycle_limit": 1.5}, ".cycle_limit: 1.5 does not fit cosine: Input should be a valid integer"),
        ({"noise": []}, ": cosine cannot work with these values: "),
    ],
)
def test_schedule_kwargs_that_do_not_fit_are_refused_by_key(kwargs: dict, message: str) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(UserError) as caught:
        build_scheduler(optimizer, ScheduleConfig(epochs=4, warmup_epochs=1.0, kwargs=kwargs), updates_per_epoch=5)
    assert str(caught.value).startswith(f"schedule.kwargs{message}")


@pytest.mark.parametrize("layer_decay", [None, 0.8])
def test_new_parameters_have_a_rate_of_their_own(network: nn.Module, layer_decay: float | None) -> None:
    new = ["layer1.0.acmix.mix.alpha", "layer1.0.acmix.attention.position_weight", "fc.bias"]
    before = group_of(network, OptimizerConfig(layer_decay=layer_decay))
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    config = OptimizerConfig(layer_decay=layer_decay, new_lr_factor=10.0)
    groups = parameter_groups(network, config, new)
    listed = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert sorted(listed) == sorted(names.values())
    for group in groups:
        for name in (names[id(parameter)] for parameter in group["params"]):
            old = before[name]
            assert group["weight_decay"] == old["weight_decay"]
            assert group.get("lr_scale", 1.0) == pytest.approx(
                old.get("lr_scale", 1.0) * (10.0 if name in new else 1.0)
            )


def test_a_rate_for_new_parameters_is_refused_where_none_is_new(network: nn.Module) -> None:
    with pytest.raises(UserError, match=r"optimizer\.new_lr_factor.*scripts/grow\.py"):
        parameter_groups(network, OptimizerConfig(new_lr_factor=10.0), ["no.such.parameter"])
