"""An interrupted run, resumed, ends bit-identical to one that was never interrupted, and logs every step once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EVERYTHING = [
    "precision.amp=bf16", "optimizer.accumulate=2", "optimizer.clip_grad=1.0", "ema.decay=0.9", "ema.warmup=true",
    "augment.mixup=0.4", "augment.cutmix=1.0", "augment.erase_prob=0.3", "augment.auto_augment=rand-m5-n1",
    "loss.label_smoothing=0.1", "model.kwargs.drop_path_rate=0.3", "model.kwargs.drop_rate=0.2",
]  # fmt: skip
FP16 = ["precision.amp=fp16", "ema.decay=0.9", "optimizer.name=adamw", "data.image_size=12"]  # slow on a CPU
ACMIX = ["model.kwargs.of=acmix_resnet26", "model.kwargs.stem=cifar", "model.kwargs.base_width=8"]
Training = Callable[..., None]
Compare = Callable[[Path, Path], None]


def fault(name: str, at: int, **more: object) -> list[str]:
    """Overrides that make the network fail at forward pass `at`."""
    return [f"model.kwargs.{key}={value}" for key, value in {"fault": name, "at": at, **more}.items()]


@pytest.mark.parametrize(
    ("ranks", "workers", "extra"),
    [
        pytest.param(1, 0, EVERYTHING, id="one process"),
        pytest.param(2, 2, EVERYTHING, id="two processes with two workers each"),
        pytest.param(1, 2, FP16, id="fp16 with two workers"),
        pytest.param(1, 0, ACMIX, id="acmix", marks=pytest.mark.drill),
        pytest.param(2, 0, ["precision.channels_last=true"], id="channels last", marks=pytest.mark.drill),
    ],
)
def test_run_stopped_twice_in_an_epoch_ends_bit_identical(
    ranks: int,
    workers: int,
    extra: list[str],
    tmp_path: Path,
    run_training: Training,
    assert_same_run: Compare,
    report: Callable[..., None],
) -> None:
    common = [*extra, f"data.num_workers={workers}", "schedule.steps=9"]
    run_training(tmp_path / "whole", *common, ranks=ranks)
    for stop in (fault("SIGTERM", 3, rank=ranks - 1), fault("SIGUSR1", 4)):
        run_training(tmp_path / "resumed", *common, *stop, "--resume", "auto", ranks=ranks, status=75)
    run_training(tmp_path / "resumed", *common, "--resume", "auto", ranks=ranks)
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")
    report("Stopped twice in one epoch and resumed", "Ends bit-identical, every step logged once", 1, 1)


def test_run_stopped_in_its_evaluation_evaluates_when_resumed(
    tmp_path: Path, run_training: Training, assert_same_run: Compare
) -> None:
    epochs_of_two = ["data.train_split=val", "data.batch_size=180", "schedule.epochs=2", "schedule.steps=4"]
    common = [*epochs_of_two, "run.log_every=1"]
    run_training(tmp_path / "whole", *common)
    stop = fault("SIGTERM", 2, during="eval")
    run_training(tmp_path / "resumed", *common, *stop, status=75)
    run_training(tmp_path / "resumed", *common, "--resume", "auto")
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.drill)])
def test_a_run_continued_in_a_new_folder_and_killed_at_its_first_step_goes_on_from_there(
    ranks: int, tmp_path: Path, run_training: Training, start_training: Any, assert_same_end: Compare,
    report: Callable[..., None],
) -> None:  # fmt: skip
    common = [*EVERYTHING, "schedule.steps=6"]
    whole, branch = tmp_path / "whole", tmp_path / "branch"
    run_training(whole, *common, "run.checkpoint_every=4", ranks=ranks)
    killed = [*fault("SIGKILL", 1, rank=ranks - 1), "--resume", whole / "checkpoints" / "step_00000004"]
    for program in start_training(branch, *common, *killed, ranks=ranks):
        assert program.wait() != 0
    assert (branch / "checkpoints" / "last" / "manifest.json").is_file()
    run_training(branch, *common, "--resume", "auto", ranks=ranks)
    assert_same_end(whole, branch)
    rows = [json.loads(line) for line in (branch / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["event"] == "train"] == [5, 6]
    report(
        "SIGKILL at the first step of a run continued in a new run.dir",
        "Resumed there with --resume auto, the run ends bit-identical to the one it came from",
        1,
        1,
    )
