"""A resume with a changed config: refused before anything is touched, or logged."""

import json
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
model: {name: test_resnet, kwargs: {drop_rate: 0.1}}
data: {dataset: digits, image_size: 24, batch_size: 16, val_batch_size: 360, num_workers: 0}
augment: {crop: pad, pad: 2}
optimizer: {name: adamw, lr: 0.01}
schedule: {epochs: 2, steps: 2}
run: {dir: run, log_every: 1, threads: 1}
"""
Train = Callable[..., tuple[int, str, str]]


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Train]:
    """Resume, by train.py's main in this process, a run of two updates that is finished."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    main = runpy.run_path(str(ROOT / "train.py"))["main"]

    def run(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        return main(["--config", "tiny.yaml", *arguments]), *capfd.readouterr()

    assert run()[0] == 0
    return run


def contents(folder: Path) -> dict[str, tuple[bytes | None, int]]:
    found = {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*") if path.name != ".lock"}
    return {str(path): (data, path.lstat().st_mtime_ns if data else 0) for path, data in found.items()}


REFUSED = {
    "model.name": ("test_resnet", "test_resnet2"),
    "model.kwargs.heads": ("null", "8"),
    "model.kwargs.layers": ("null", "[1, 1, 1, 2]"),
    "data.batch_size": ("16", "8"),
    "data.repeated_aug": ("1", "2"),
    "optimizer.name": ("adamw", "lion"),
    "optimizer.weight_decay": ("0.0001", "0.0"),
    "optimizer.layer_decay": ("null", "0.9"),
    "optimizer.kwargs.amsgrad": ("null", "true"),
    "optimizer.accumulate": ("16", "32"),
    "schedule.steps": ("2", "1"),
    "run.seed": ("0", "1"),
}
GIVEN = {"optimizer.accumulate": "2"}


def test_a_change_that_does_not_fit_is_refused_and_nothing_is_touched(train: Train) -> None:
    before = contents(Path("run"))
    for key, (old, new) in REFUSED.items():
        for resume in ("run", "auto"):
            more = [] if key.startswith("schedule") else ["schedule.steps=4"]
            status, _, errors = train("--resume", resume, f"{key}={GIVEN.get(key, new)}", *more)
            assert status == 2, (key, errors)
            assert errors.count("error: ") == 1, errors
            assert "Traceback" not in errors
            for part in (key, old, new):
                assert part in errors, (key, errors)
            assert (
                "give it as it was, or start a new run" in errors or "give at least" in errors or "set data" in errors
            )
            assert contents(Path("run")) == before, key
            if key == "model.kwargs.layers":
                assert errors.startswith("error: model.kwargs.layers was null, now it is [1, 1, 1, 2]: the checkpoint")
                assert len(errors.splitlines()) == 1


CHANGED = [
    "schedule.steps=4", "schedule.epochs=3", "augment.mixup=0.5", "loss.name=bce", "precision.amp=bf16",
    "ema.decay=0.9", "optimizer.lr=0.001", "optimizer.weight_decay=0.05", "model.kwargs.drop_rate=0.2",
]  # fmt: skip


def test_a_finished_run_goes_on_with_a_longer_schedule_and_logs_what_changed(train: Train) -> None:
    status, out, errors = train("--resume", "auto", *CHANGED)
    assert status == 0, errors
    told = [line for line in out.splitlines() if line.startswith("Changed: ")]
    assert len(told) == len(CHANGED)
    assert "Changed: schedule.epochs was 2, now 3; the learning rate follows the new schedule from here on" in told
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    start = [row for row in rows if row["event"] == "start"][-1]
    assert start["changed"].keys() == {change.partition("=")[0] for change in CHANGED}
    assert start["changed"]["ema.decay"] == [None, 0.9]
    assert [row["step"] for row in rows if row["event"] == "train"] == [1, 2, 3, 4]

    status, out, _ = train("--resume", "auto", *CHANGED)
    assert (status, "run is finished at step 4, nothing to do; raise schedule.steps to go on" in out) == (0, True)
    status, _, errors = train("--resume", "auto")
    assert status == 2
    assert "schedule.steps: 2 is less than the run has done already, 4 updates" in errors


def test_the_average_begins_anew_when_it_was_off_in_between(train: Train) -> None:
    for steps, decay in ((3, "0.5"), (4, "null"), (5, "0.5")):
        status, _, errors = train("--resume", "run", f"schedule.steps={steps}", f"ema.decay={decay}")
        assert status == 0, errors
    from acmix.checkpoint.read import load_checkpoint

    assert load_checkpoint(Path("run")).training["ema_updates"] == 1


def test_initial_weights_that_do_not_exist_are_named_with_the_nearest(train: Train) -> None:
    for given, part in (
        ("rum", "nearest: run"),
        ("https://example.org/w.pth", "download"),
        ("hf-hub:timm/x", "download"),
    ):
        status, _, errors = train("run.dir=other", f"model.checkpoint={given}")
        assert status == 2
        assert f"model.checkpoint: {given} does not exist" in errors
        assert part in errors
