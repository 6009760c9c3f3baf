"""Class weights: the mean of a step is plain PyTorch's on all its images, however they are divided."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn
from torch.nn import functional as F

from acmix.config import Config, load_config
from acmix.data.classes import Renumbered, class_counts
from acmix.data.datasets import build_source
from acmix.data.loader import Batch
from acmix.data.transforms import build_mixup
from acmix.engine.learner import Learner
from acmix.engine.loss import class_weights
from acmix.errors import UserError
from acmix.process.distributed import Distributed

CLASSES = ["ant", "bee", "cow", "dog"]
WEIGHTS = torch.tensor([0.2, 1.0, 5.0, 0.7])


class Loader:
    """What the learner wants to know of a TrainLoader."""

    global_batch = 8
    updates_per_epoch = 10
    classes = CLASSES
    class_counts: np.ndarray | None = np.array([1, 2, 5, 0])


def config(**sections: dict) -> Config:
    base: dict[str, dict] = {
        "model": {"name": "test"}, "data": {"dataset": "digits", "batch_size": 8}, "schedule": {"epochs": 3},
        "run": {"device": "cpu"}, "loss": {"class_weights": WEIGHTS.tolist()},
    }  # fmt: skip
    return Config.model_validate({key: base.get(key, {}) | sections.get(key, {}) for key in {**base, **sections}})


def learner(*, mixing: bool = False, **sections: dict) -> Learner:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    chosen = config(**sections)
    mixup = build_mixup(chosen, 4) if mixing else None
    return Learner(chosen, model, Distributed.start(chosen.run), Loader(), mixing=mixup)  # type: ignore[arg-type]


def make_batch(targets: list[int], unreadable: tuple[int, ...] = ()) -> Batch:
    images = torch.randn(len(targets), 3, 2, 2, generator=torch.Generator().manual_seed(len(targets)))
    valid = torch.ones(len(targets), dtype=torch.bool)
    valid[list(unreadable)] = False
    return Batch(images, torch.tensor(targets), torch.arange(len(targets)), valid, ["unreadable"] * len(unreadable))


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])  # type: ignore[union-attr]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_step_has_the_loss_and_gradient_of_plain_pytorch_on_all_its_images(smoothing: float) -> None:
    ours = learner(loss={"label_smoothing": smoothing})
    parts = [make_batch([0, 0, 0, 2]), make_batch([1, 3, 2], unreadable=(1,)), make_batch([0, 1])]
    losses = torch.stack([loss.read() for loss in ours.gradients(parts, 1)])
    found = gradient(ours.model)
    ours.discard()
    images, targets = (torch.cat([getattr(part, key)[part.valid] for part in parts]) for key in ("images", "targets"))
    expected = F.cross_entropy(ours.model(images), targets, weight=WEIGHTS, label_smoothing=smoothing)
    expected.backward()
    torch.testing.assert_close(losses.mean(), expected.double(), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(found, gradient(ours.model))


def test_one_batch_alone_is_weighted_as_plain_pytorch_does_and_one_without_images_has_no_loss() -> None:
    ours = learner()
    batch = make_batch([0, 2, 2, 3])
    expected = F.cross_entropy(ours.model(batch.images), batch.targets, weight=WEIGHTS)
    torch.testing.assert_close(ours.loss(batch, 1), expected)
    assert ours.loss(make_batch([0, 1], unreadable=(0, 1)), 1).item() == 0.0


def test_mixed_targets_are_weighted_class_by_class_as_plain_pytorch_does() -> None:
    mixed = {"augment": {"mixup": 0.5, "cutmix": 1.0}, "loss": {"label_smoothing": 0.1}}
    ours, seen = learner(mixing=True, **mixed), []
    mixing = ours.mixing
    assert mixing is not None
    ours.mixing = lambda images, targets: seen.append(mixing(images.clone(), targets)) or seen[-1]
    parts = [make_batch([0, 1, 2, 3]), make_batch([2, 2, 0, 1])]
    losses = torch.stack([loss.read() for loss in ours.gradients(parts, 1)])
    images, targets = (torch.cat(both) for both in zip(*seen, strict=True))
    expected = F.cross_entropy(ours.model(images), targets, weight=WEIGHTS)
    torch.testing.assert_close(losses.mean(), expected.double(), rtol=1e-6, atol=0.0)


def test_with_binary_questions_an_image_counts_by_the_weight_of_its_class() -> None:
    ours = learner(loss={"name": "bce", "label_smoothing": 0.1})
    parts = [make_batch([0, 2, 2]), make_batch([1, 3])]
    losses = torch.stack([loss.read() for loss in ours.gradients(parts, 1)])
    images, targets = torch.cat([part.images for part in parts]), torch.cat([part.targets for part in parts])
    soft = F.one_hot(targets, 4) * 0.9 + 0.1 / 4
    each = F.binary_cross_entropy_with_logits(ours.model(images), soft, reduction="none").mean(1)
    expected = (each * WEIGHTS[targets]).sum() / WEIGHTS[targets].sum()
    torch.testing.assert_close(losses.mean(), expected.double(), rtol=1e-6, atol=0.0)


def test_ranks_with_unequal_shares_take_the_step_of_one_process(launcher: Any) -> None:
    sizes = [[3, 5], [4, 4]]
    members = launcher.start_ranks(2, Path(__file__).with_name("weighted_rank.py"), json.dumps(sizes))
    assert [member.wait() for member in members] == [0, 0], members[0].errors
    found = json.loads(members[0].output)
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).double()
    generator = torch.Generator().manual_seed(1)  # the draws of weighted_rank.py
    images = torch.randn(16, 3, 2, 2, generator=generator, dtype=torch.float64)
    targets = torch.randint(4, (16,), generator=generator)
    expected = F.cross_entropy(model(images).float(), targets, weight=WEIGHTS, label_smoothing=0.1)
    expected.backward()
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(torch.tensor(found["gradient"]), gradient(model).float())


def test_balanced_weights_are_scikit_learns_whatever_the_order_of_the_classes() -> None:
    source = build_source(config().data, "train")
    counts = Counter(target for _, target in map(source.load, range(len(source))))
    wanted = compute_class_weight("balanced", classes=np.arange(10), y=np.array(list(counts.elements())))
    loader = Loader()
    loader.classes = source.classes[::-1]
    loader.class_counts = class_counts(Renumbered(source, loader.classes))
    found = class_weights(config(loss={"class_weights": "balanced"}), loader)  # type: ignore[arg-type]
    assert found is not None
    torch.testing.assert_close(found, torch.from_numpy(wanted[::-1].copy()).float())


def test_weights_by_name_leave_the_others_at_one_and_a_class_without_images_does_not_count() -> None:
    for wanted, expected in (
        ({"cow": 3.0, "ant": 0.5}, [0.5, 1.0, 3.0, 1.0]),
        ("balanced", [8 / 3, 8 / 6, 8 / 15, 1.0]),
    ):
        found = class_weights(config(loss={"class_weights": wanted}), Loader())  # type: ignore[arg-type]
        assert found is not None
        torch.testing.assert_close(found, torch.tensor(expected))


def test_weights_that_are_not_for_these_classes_are_refused_by_name() -> None:
    unknown = Loader()
    unknown.class_counts = None
    for wanted, loader, message in (
        ({"cwo": 3.0}, Loader(), "loss.class_weights: the data has no class 'cwo'; nearest: 'cow'"),
        ([1.0, 2.0], Loader(), "loss.class_weights: 2 weights for 4 classes"),
        ("balanced", unknown, "loss.class_weights: the dataset digits does not tell the classes"),
    ):
        with pytest.raises(UserError) as refusal:
            class_weights(config(loss={"class_weights": wanted}), loader)  # type: ignore[arg-type]
        assert str(refusal.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("balance", "must be one of 'none', 'balanced', got 'balance'"),
        ("[1, 0]", "must be at least 1e-30, got 0"),
        ("{ant: -1}", "must be at least 1e-30, got -1"),
        ("[1, 1.0e-300]", "must be at least 1e-30, got 1e-300"),
        ("{ant: 1.0e+300}", "must be at most 1e+30, got 1e+300"),
        ("{ant: much}", "must be a number, got 'much'"),
        ("{1: 2}", "the key 1 in loss.class_weights must be a string"),
        ("[]", "0 weights for 10 classes"),
        ("[1, 2]", "2 weights for 10 classes"),
    ],
)
def test_values_that_are_no_weights_are_refused(text: str, part: str, tmp_path: Path) -> None:
    path = tmp_path / "base.yaml"
    path.write_text(
        f"model: {{name: m, num_classes: 10}}\ndata: {{dataset: digits}}\nschedule: {{epochs: 1}}\n"
        f"loss:\n  class_weights: {text}\n"
    )
    with pytest.raises(UserError, match=r"class_weights") as refusal:
        load_config(path)
    assert part in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1
