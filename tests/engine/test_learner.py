"""One update: accumulation, averaging, clipping, mixed precision, randomness, images left out."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from acmix import ACmix
from acmix.config import Config
from acmix.data.loader import Batch
from acmix.data.transforms import build_mixup
from acmix.engine.learner import Learner, seed_step
from acmix.errors import UserError
from acmix.process.distributed import Distributed

CLASSES = 5
Build = Callable[..., Learner]


class Loader:
    """What the learner wants to know of a TrainLoader."""

    global_batch = 8
    updates_per_epoch = 10


def network() -> nn.Module:
    """Small, smooth, without batch statistics: an update then depends on the images alone."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(4 * 36, CLASSES)).double()


def make_batch(count: int, seed: int = 0, unreadable: tuple[int, ...] = ()) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 8, 8, generator=generator, dtype=torch.float64)
    targets = torch.randint(CLASSES, (count,), generator=generator)
    valid = torch.ones(count, dtype=torch.bool)
    valid[list(unreadable)] = False
    return Batch(images, targets, torch.arange(count), valid, ["unreadable"] * len(unreadable))


def split(batch: Batch, sizes: list[int]) -> list[Batch]:
    fields = [tensor.split(sizes) for tensor in (batch.images, batch.targets, batch.ids, batch.valid)]
    return [Batch(*parts, []) for parts in zip(*fields, strict=True)]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Build:
    """A learner of a network under overrides of the config's sections."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def make(model: nn.Module | None = None, mixing: bool = False, **sections: dict) -> Learner:
        base = {
            "model": {"name": "test"}, "data": {"dataset": "digits"}, "schedule": {"epochs": 3},
            "optimizer": {"name": "momentum", "lr": 0.1}, "run": {"device": "cpu"},
        }  # fmt: skip
        config = Config.model_validate({key: base.get(key, {}) | sections.get(key, {}) for key in {**base, **sections}})
        mixup = build_mixup(config, CLASSES) if mixing else None
        return Learner(config, model or network(), Distributed.start(config.run), Loader(), mixing=mixup)  # type: ignore[arg-type]

    return make


def weights(learner: Learner) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in learner.model.parameters()])


def test_accumulated_micro_batches_make_the_update_of_the_whole_batch(build: Build) -> None:
    whole, parts = build(), build()
    batch = make_batch(8)
    assert len(whole.gradients([batch], 1)) == 1
    whole.update(1)
    losses = parts.gradients(split(batch, [4, 4]), 1)
    parts.update(1)
    assert len(losses) == 2
    torch.testing.assert_close(weights(parts), weights(whole))


def test_images_that_could_not_be_read_leave_the_loss_and_the_gradient_alone(build: Build) -> None:
    learner = build()
    batch = make_batch(6, unreadable=(1, 4))
    loss = learner.loss(batch, 1)
    kept = batch.valid
    expected = F.cross_entropy(learner.model(batch.images[kept]).float(), batch.targets[kept])
    torch.testing.assert_close(loss, expected)
    nothing = make_batch(2, unreadable=(0, 1))
    assert learner.loss(nothing, 1).item() == 0.0


def test_average_follows_its_formula_and_its_counter(build: Build) -> None:
    learner = build(ema={"decay": 0.75})
    assert learner.ema is not None
    average = None
    for step in (1, 2, 3):
        learner.gradients([make_batch(8, seed=step)], step)
        learner.update(step)
        now = weights(learner)
        average = now if average is None else 0.75 * average + 0.25 * now  # the first update is copied
    found = torch.cat([parameter.flatten() for parameter in learner.ema.module.parameters()])
    torch.testing.assert_close(found, average)
    assert learner.training_state()["ema_updates"] == 3
    assert learner.averaged is learner.ema.module


@pytest.mark.parametrize("mode", ["norm", "value", "agc"])
def test_clipping_limits_what_it_says_and_reports_the_norm_before(mode: str, build: Build) -> None:
    free, clipped = (
        build(),
        build(optimizer={"name": "momentum", "lr": 1.0, "momentum": 0.0, "clip_grad": 1e-3, "clip_mode": mode}),
    )
    before = weights(clipped)
    for learner in (free, clipped):
        learner.gradients([make_batch(8)], 1)
    expected = torch.cat([parameter.grad.flatten() for parameter in free.model.parameters()]).norm()  # type: ignore[union-attr]
    norm = clipped.update(1)
    assert norm is not None
    torch.testing.assert_close(norm, expected)
    moved = weights(clipped) - before
    weight_decay = 1e-4 * before.abs().max()
    if mode == "norm":
        assert moved.norm() < 1e-3 + weight_decay * before.numel() ** 0.5
    elif mode == "value":
        assert moved.abs().max() <= 1e-3 + weight_decay
    else:
        assert moved.norm() < expected


def test_first_update_uses_the_warm_up_rate_and_the_rate_is_that_of_the_update(build: Build) -> None:
    learner = build(schedule={"epochs": 3, "warmup_epochs": 1.0, "warmup_lr": 0.01})
    rates = []
    for step in (1, 2):
        learner.gradients([make_batch(8)], step)
        learner.update(step)
        rates.append(learner.lr)
    assert rates == pytest.approx([0.01, 0.01 + 0.09 / 10])


def test_randomness_of_a_step_follows_from_the_step_alone(build: Build) -> None:
    def losses(noise: int) -> list[float]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, CLASSES)).double()
        learner = build(
            model, mixing=True, augment={"mixup": 0.5, "cutmix": 1.0}, data={"dataset": "digits", "batch_size": 8}
        )
        torch.rand(noise)  # whatever was drawn before
        return [learner.loss(make_batch(8), step, micro).item() for step, micro in ((1, 0), (1, 1), (2, 0))]

    assert losses(noise=0) == losses(noise=7)
    assert len(set(losses(noise=0))) == 3


def test_ranks_draw_differently(build: Build) -> None:
    draws = []
    for rank in (0, 1, 0):
        seed_step(0, 5, rank, 0)
        draws.append(torch.rand(1).item())
    assert draws[0] != draws[1]
    assert draws[0] == draws[2]


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_update_in_mixed_precision_points_where_the_precise_one_does(amp: str, build: Build) -> None:
    precise, reduced = build(network().float()), build(network().float(), precision={"amp": amp})
    batch = make_batch(8)
    batch = Batch(batch.images.float(), batch.targets, batch.ids, batch.valid, [])
    steps = []
    for learner in (precise, reduced):
        before = weights(learner)
        learner.gradients([batch], 1)
        learner.update(1)
        steps.append(weights(learner) - before)
    assert F.cosine_similarity(steps[0], steps[1], dim=0) > 1 - 8 * torch.finfo(torch.bfloat16).eps
    assert reduced.scaler.is_enabled() == (amp == "fp16")


def test_binary_loss_treats_every_class_as_a_question_of_its_own(build: Build) -> None:
    learner = build(loss={"name": "bce", "label_smoothing": 0.1})
    batch = make_batch(8)
    soft = F.one_hot(batch.targets, CLASSES) * 0.9 + 0.1 / CLASSES
    expected = F.binary_cross_entropy_with_logits(learner.model(batch.images).float(), soft.float())
    torch.testing.assert_close(learner.loss(batch, 1), expected)


def test_state_restores_the_very_next_update(build: Build) -> None:
    original = build(ema={"decay": 0.9}, optimizer={"name": "adamw", "lr": 0.01})
    for step in (1, 2):
        original.gradients([make_batch(8, seed=step)], step)
        original.update(step)
    restored = build(ema={"decay": 0.9}, optimizer={"name": "adamw", "lr": 0.01})
    assert original.ema is not None
    assert restored.ema is not None
    restored.load(original.model.state_dict(), original.ema.module.state_dict(), deepcopy(original.training_state()))
    for learner in (original, restored):
        learner.gradients([make_batch(8, seed=3)], 3)
        learner.update(3)
    assert torch.equal(weights(original), weights(restored))
    for one, other in zip(original.ema.module.parameters(), restored.ema.module.parameters(), strict=True):
        assert torch.equal(one, other)


def after_steps(learner: Learner, steps: int) -> Learner:
    for step in range(1, steps + 1):
        learner.gradients([make_batch(8, seed=step)], step)
        learner.update(step)
    return learner


@pytest.mark.parametrize(
    ("name", "key", "before", "now"),
    [
        ("sgd", "weight_decay", 0.1, 0.5),
        ("sgd", "momentum", 0.9, 0.5),
        ("sgd", "kwargs", {}, {"nesterov": False}),
        ("adamw", "betas", (0.9, 0.999), (0.8, 0.9)),
        ("adamw", "eps", 1e-8, 1e-4),
        ("adamw", "kwargs", {"maximize": True}, {}),
        ("lion", "betas", (0.9, 0.99), (0.5, 0.6)),
        ("lion", "kwargs", {}, {"caution": True}),
        ("adan", "kwargs", {"no_prox": True}, {"no_prox": False}),
    ],
)
def test_a_hyperparameter_changed_at_a_resume_counts_from_the_next_step(
    name: str, key: str, before: object, now: object, build: Build
) -> None:
    """State from the checkpoint, hyperparameter from the config: as if it had been set between two steps of one run."""
    base = {"name": name, "lr": 0.01}
    original = after_steps(build(optimizer={**base, key: before}), 2)
    resumed = build(optimizer={**base, key: now})
    changed = {key} if key != "kwargs" else {*before, *now}  # type: ignore[misc]
    as_built = [dict(group) for group in resumed.optimizer.param_groups]
    for group, wanted in zip(original.optimizer.param_groups, as_built, strict=True):
        differs = {entry for entry in wanted if entry != "params" and group[entry] != wanted[entry]} - {"lr"}
        assert differs == changed or (key == "weight_decay" and not differs), "biases never decay"
    resumed.load(original.model.state_dict(), None, deepcopy(original.training_state()))
    for group, wanted in zip(original.optimizer.param_groups, as_built, strict=True):
        group.update({entry: wanted[entry] for entry in changed})
    for learner in (original, resumed):
        learner.gradients([make_batch(8, seed=3)], 3)
        learner.update(3)
    assert torch.equal(weights(original), weights(resumed))


@pytest.mark.parametrize("name", ["adan", "lamb"])
def test_what_an_optimizer_keeps_in_its_groups_comes_from_the_checkpoint(name: str, build: Build) -> None:
    original = after_steps(build(optimizer={"name": name, "lr": 0.01}), 2)
    resumed = build(optimizer={"name": name, "lr": 0.01, "weight_decay": 0.5})
    resumed.load(original.model.state_dict(), None, original.training_state())
    assert [group["step"] for group in resumed.optimizer.param_groups] == [2, 2]
    assert 0.5 in [group["weight_decay"] for group in resumed.optimizer.param_groups]


def test_state_that_the_optimizer_cannot_use_is_refused(build: Build) -> None:
    original = after_steps(build(optimizer={"name": "adamw", "lr": 0.01}), 1)
    resumed = build(optimizer={"name": "adamw", "lr": 0.01, "kwargs": {"amsgrad": True}})
    with pytest.raises(UserError, match="has no 'max_exp_avg_sq', which adamw needs"):
        resumed.load(original.model.state_dict(), None, original.training_state())
    undecayed = build(optimizer={"name": "adamw", "lr": 0.01, "weight_decay": 0.0})
    with pytest.raises(UserError, match="does not fit this model or optimizer: its parameters are in 2 groups, now in"):
        undecayed.load(original.model.state_dict(), None, original.training_state())


@pytest.mark.slow
def test_compiled_learner_has_plain_names_and_the_same_loss(build: Build) -> None:
    eager, compiled = build(), build(precision={"compile": True})
    batch = make_batch(8)
    torch.testing.assert_close(compiled.loss(batch, 1), eager.loss(batch, 1))
    assert compiled.model.state_dict().keys() == eager.model.state_dict().keys()


class TwoHeaded(nn.Module):
    """Gives one output in evaluation and two in training."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        out = self.inner(x)
        return (out, out) if self.training else out


def test_a_network_of_several_outputs_in_training_is_refused(build: Build) -> None:
    with pytest.raises(UserError, match=r"^model\.name: test gives a tuple in training"):
        build(TwoHeaded().train()).gradients([make_batch(4)], 1)


def test_path_weights_are_frozen_for_their_epochs_and_then_learned_as_from_the_start(build: Build) -> None:
    def make(**optimizer: float) -> Learner:
        torch.manual_seed(3)
        block = ACmix(3, 4, heads=2, kernel_att=3)
        model = nn.Sequential(block, nn.Flatten(), nn.Linear(4 * 64, CLASSES)).double()
        options = {"name": "adamw", "lr": 0.01, "clip_grad": 1.0, **optimizer}
        return build(model, optimizer=options, schedule={"epochs": 3, "warmup_epochs": 0.0})

    def step(learner: Learner, number: int) -> float:
        learner.gradients([make_batch(8, number)], number)
        learner.update(number)
        return float(learner.model[0].mix.alpha.detach())

    learner = make(path_freeze_epochs=0.2)  # two of ten updates
    bias = learner.model[0].qkv.bias.detach().clone()
    assert [step(learner, 1), step(learner, 2)] == [0.5, 0.5]
    assert not torch.equal(learner.model[0].qkv.bias, bias)
    resumed = make(path_freeze_epochs=0.2)
    resumed.load(learner.model.state_dict(), None, deepcopy(learner.training_state()))
    moved = step(learner, 3)
    assert moved == pytest.approx(0.5 + 0.01 * (1 if moved > 0.5 else -1), rel=1e-3)  # AdamW's first step is the rate
    assert step(resumed, 3) == moved
    assert torch.equal(weights(resumed), weights(learner))
    assert step(make(), 1) != 0.5


def test_path_weights_decay_only_as_asked(build: Build) -> None:
    values = []
    for decay in (0.0, 0.5):
        torch.manual_seed(3)
        model = nn.Sequential(ACmix(3, 4, heads=2, kernel_att=3), nn.Flatten(), nn.Linear(4 * 64, CLASSES)).double()
        options = {"name": "momentum", "lr": 0.01, "weight_decay": 0.3, "path_weight_decay": decay}
        learner = build(model, optimizer=options, schedule={"epochs": 3, "warmup_epochs": 0.0})
        learner.gradients([make_batch(8)], 1)
        learner.update(1)
        values.append(float(model[0].mix.alpha.detach()))
    assert values[1] - values[0] == pytest.approx(-0.01 * 0.5 * 0.5, rel=1e-6)
