"""train.py's command line: bad input is refused with one message, good input leaves what the contract says."""

import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from PIL import Image

from acmix.engine.lock import RunLock
from acmix.engine.run_folder import launcher_id

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """
model: {name: test_resnet}
data: {dataset: digits, image_size: 24, batch_size: 16, val_batch_size: 120, num_workers: 0}
augment: {crop: pad, pad: 2}
schedule: {epochs: 2, steps: 3}
run: {log_every: 1}
"""


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


Train = Callable[..., Outcome]


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Train:
    """Run train.py's main in this process, in an empty folder that holds tiny.yaml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    main = runpy.run_path(str(ROOT / "train.py"))["main"]

    def run(*arguments: str, config: str = "tiny.yaml") -> Outcome:
        capfd.readouterr()
        status = main(["--config", config, *arguments])
        return Outcome(status, *capfd.readouterr())

    return run


def make_images(root: Path, splits: dict[str, list[str]], count: int = 20) -> Path:
    for split, classes in splits.items():
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (24, 24), (index, 3 * index, 5 * index)).save(folder / f"{index}.png")
    return root


def assert_refused(outcome: Outcome, *parts: str) -> None:
    """One message, status 2, no traceback, nothing left behind."""
    assert outcome.status == 2, outcome
    assert outcome.err.startswith("error: ")
    assert "Traceback" not in outcome.err + outcome.out
    for part in parts:
        assert part in outcome.err
    assert sorted(path.name for path in Path().iterdir() if path.name not in ("data", "given")) == ["tiny.yaml"]


BAD_CONFIGS = {
    "missing": (None, ["nowhere.yaml", "no such config file"]),
    "broken": ("model: {name: [", ["bad.yaml"]),
    "python tag": ("model: !!python/object/apply:os.system ['touch pwned']", ["bad.yaml", "python/object"]),
    "unknown section": (CONFIG + "optimiser: {lr: 1}", ["optimiser", "optimizer"]),
    "unknown key": (CONFIG.replace("epochs", "epoch"), ["schedule.epoch", "schedule.epochs"]),
    "duplicate key": (CONFIG + "run: {seed: 1}", ["run", "duplicate"]),
    "wrong type": (CONFIG.replace("epochs: 2", "epochs: two"), ["schedule.epochs", "integer"]),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_config_is_refused(case: str, train: Train, tmp_path: Path) -> None:
    text, parts = BAD_CONFIGS[case]
    name = "nowhere.yaml"
    if text is not None:
        (tmp_path / "given").mkdir()
        name = "given/bad.yaml"
        (tmp_path / name).write_text(text)
    assert_refused(train(config=name), *parts)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["data.batch_size=-1"], ["data.batch_size", "at least 1"]),
        (["model.name=acmix_resnet62"], ["model.name", "acmix_resnet26"]),
        (["model.num_classes=7"], ["model.num_classes", "7", "10"]),
        (["data.dataset=folder", "data.root=nowhere"], ["nowhere"]),
        (["optimizer.name=sdg"], ["optimizer.name", "sgd"]),
        (["optimizer.kwargs.nestrov=true"], ["optimizer.kwargs.nestrov", "optimizer.kwargs.nesterov"]),
        (["schedule.kwargs.k_decay=x"], ["schedule.kwargs.k_decay", "'x'", "number"]),
        (["run.probes=[path]"], ["run.probes", "nearest: paths", "all: paths, path_balance"]),
        (["run.loggers=[tensorboard, wanbd]"], ["run.loggers.1", "'wandb'"]),
        (["loss.class_weights={three: 2}"], ["loss.class_weights", "'three'", "nearest"]),
        pytest.param(
            ["run.loggers=[mlflow]"], ["run.loggers", "pip install mlflow"],
            marks=pytest.mark.skipif(find_spec("mlflow") is not None, reason="mlflow is installed"),
        ),
        (["model.checkpoint=nowhere.pth"], ["nowhere.pth"]),
        (["--resume", "nowhere"], ["--resume", "nowhere"]),
        (["--resume"], ["--resume", "expected one argument"]),
        (["--frobnicate"], ["--frobnicate"]),
        (["lr=1"], ["lr", "optimizer.lr"]),
        (["run.dir=tiny.yaml"], ["run.dir", "not a folder"]),
        pytest.param(
            ["run.device=cuda"], ["run.device", "auto"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA"),
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_bad_value_is_refused(arguments: list[str], parts: list[str], train: Train) -> None:
    assert_refused(train(*arguments), *parts)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["model.name=test_vit"], ["model.kwargs.img_size=24", "data.image_size=160", "Input height (24)"]),
        (["model.name=levit_128s"], ["data.image_size=224"]),
        (["model.kwargs.global_pool=''"], ["model.kwargs.global_pool"]),
        (["model.kwargs.in_chans=4"], ["model.kwargs.in_chans", "RGB", "grey"]),
        (["model.name=acmix_swin_tiny", "model.kwargs.img_size=32"], ["model.kwargs.img_size", "[24, 24]"]),
        (
            ["model.name=acmix_resnet26", "model.kwargs.pretrained=true"],
            ["model.kwargs.pretrained", "model.checkpoint"],
        ),
        (["model.kwargs.pretrained=1"], ["model.kwargs.pretrained", "true or false"]),
        (["model.kwargs.image_size=24"], ["model.kwargs.image_size", "data.image_size"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_the_model_cannot_take_is_refused_before_anything_is_created(
    arguments: list[str], parts: list[str], train: Train
) -> None:
    assert_refused(train(*arguments, "run.dir=given"), *parts)
    assert not Path("given").exists()


def test_classes_that_differ_or_are_empty_are_refused(train: Train, tmp_path: Path) -> None:
    root = make_images(tmp_path / "data", {"train": ["ant", "bee"], "val": ["ant", "cow"]})
    folder = ["data.dataset=folder", f"data.root={root}"]
    assert_refused(train(*folder), "bee", "cow")
    (root / "val" / "cow").rename(root / "val" / "bee")
    for file in (root / "val" / "bee").iterdir():
        file.unlink()
    assert_refused(train(*folder), "bee")


def test_run_leaves_what_the_contract_says(train: Train, tmp_path: Path) -> None:
    outcome = train("run.dir=given", "ema.decay=0.5")
    assert outcome.status == 0, outcome.err
    assert "given" in outcome.out.splitlines()[0]
    assert "given" in outcome.out.splitlines()[-1]
    found = {path.name for path in Path("given").iterdir() if not path.name.startswith(".")}
    assert found == {"config.yaml", "classes.json", "metrics.jsonl", "tensorboard", "checkpoints", "summary.json"}
    rows = [json.loads(line) for line in Path("given/metrics.jsonl").read_text().splitlines()]
    assert [row["event"] for row in rows] == ["start", "train", "train", "train", "eval", "end"]
    assert [row["step"] for row in rows if row["event"] == "train"] == [1, 2, 3]
    [start] = [row for row in rows if row["event"] == "start"]
    assert {"config", "versions", "git", "parameters", "device"} <= start.keys()
    [evaluation] = [row for row in rows if row["event"] == "eval"]
    assert evaluation["count"] == 360
    assert json.loads(Path("given/summary.json").read_text())["status"] == "done"
    last = Path("given/checkpoints/last")
    assert last.is_symlink()
    assert {"model.safetensors", "ema.safetensors", "manifest.json"} <= {path.name for path in last.iterdir()}


def test_the_last_step_of_a_run_is_logged_once_also_where_schedule_steps_ends_it(train: Train, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(CONFIG.replace("log_every: 1", "log_every: 50"))
    for steps in (2, 3):
        outcome = train("run.dir=run", f"schedule.steps={steps}", "--resume", "auto")
        assert outcome.status == 0, outcome.err
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["event"] == "train"] == [2, 3]


def strict_json(path: Path) -> Any:
    def refuse(word: str) -> None:
        raise AssertionError(f"{path}: {word} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_a_network_that_diverged_is_told_is_never_the_best_and_leaves_json_that_every_reader_takes(
    train: Train,
) -> None:
    outcome = train("run.dir=run", "optimizer.lr=1e30", "data.batch_size=1400", "schedule.epochs=2")
    assert outcome.status == 1, outcome.err
    assert "warning: the loss of this evaluation is nan" in outcome.err
    assert "the loss is not finite at step 2" in outcome.err
    assert "step_00000001, of the weights that gave this loss; there is none before it" in outcome.err
    assert not Path("run/checkpoints/best").is_symlink()
    progress = strict_json(Path("run/checkpoints/last/progress.json"))
    assert (progress["best"], progress["history"][0]["loss"]) == (None, "nan")


def test_a_run_that_diverges_at_its_last_step_is_not_done_and_goes_on_from_before(train: Train) -> None:
    begin = ["run.dir=run", "run.checkpoint_every=1", "schedule.steps=2"]
    outcome = train(*begin, "optimizer.lr=1e30", "schedule.warmup_epochs=1.9", "schedule.warmup_lr=1e-9")
    assert outcome.status == 1, outcome
    assert "error: the run ends at step 2 with an evaluation whose loss is nan" in outcome.err
    assert strict_json(Path("run/summary.json"))["status"] == "failed"
    assert Path("run/checkpoints/last").resolve().name == "step_00000001", "what diverged is not saved"
    assert train(*begin, "--resume", "auto").status == 0
    assert strict_json(Path("run/summary.json"))["status"] == "done"


def test_kwargs_of_optimizer_and_schedule_are_part_of_the_resolved_config(train: Train) -> None:
    kwargs = ["optimizer.kwargs.nesterov=false", "schedule.kwargs={k_decay: 2, noise: [0.5, 0.9]}"]
    assert train("run.dir=run", "schedule.steps=1", *kwargs).status == 0
    resolved = yaml.safe_load(Path("run/config.yaml").read_text())
    assert resolved["optimizer"]["kwargs"] == {"nesterov": False}
    assert resolved["schedule"]["kwargs"] == {"k_decay": 2, "noise": [0.5, 0.9]}
    assert train(*kwargs, "run.dir=run", "--resume", "auto").status == 0


def test_unreadable_images_are_left_out_up_to_a_limit(train: Train, tmp_path: Path) -> None:
    root = make_images(tmp_path / "data", {"train": ["cat", "dog"], "val": ["cat", "dog"]}, count=16)
    bad = root / "train" / "dog" / "3.png"
    bad.write_bytes(bad.read_bytes()[:40])
    skip = ["data.dataset=folder", f"data.root={root}", "data.on_error=skip"]
    outcome = train(*skip, "run.dir=run", "data.max_errors=1")  # one in each of two epochs
    assert outcome.status == 0, outcome
    assert f"warning: left out at step 1: {bad}" in outcome.out or f"warning: left out at step 2: {bad}" in outcome.out
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert next(row for row in rows if row["event"] == "unread")["count"] == 1
    outcome = train(*skip, "run.dir=other", "data.max_errors=0")
    assert outcome.status == 2
    assert "1 images of this epoch could not be read, more than data.max_errors (0)" in outcome.err
    assert "the warnings above name them" in outcome.err


def test_folder_that_holds_a_run_is_refused_and_left_alone(train: Train) -> None:
    assert train("run.dir=given").status == 0
    before = {path: path.stat().st_mtime_ns for path in Path("given").rglob("*")}
    assert_refused(train("run.dir=given"), "given", "--resume auto", "another run.dir")
    assert {path: path.stat().st_mtime_ns for path in Path("given").rglob("*")} == before


@pytest.mark.parametrize("resume", ["none", "auto"])
def test_a_run_that_made_no_update_leaves_its_folder_to_the_corrected_command(
    resume: str, train: Train, tmp_path: Path
) -> None:
    root = make_images(tmp_path / "data", {"train": ["ant", "bee"], "val": ["ant", "bee"]}, count=16)
    for file in (root / "train").rglob("*.png"):
        file.write_bytes(file.read_bytes()[:40])
    folder = ["data.dataset=folder", "run.dir=given", "--resume", resume]
    assert "unreadable image" in train(*folder, f"data.root={root}").err
    assert json.loads(Path("given/summary.json").read_text())["status"] == "failed"
    good = make_images(tmp_path / "given-images", {"train": ["cow", "dog"], "val": ["cow", "dog"]})
    with RunLock(Path("given")):
        assert "given" in (outcome := train(*folder, f"data.root={good}")).err
        assert outcome.status == 2
    assert train(*folder, f"data.root={good}").status == 0
    rows = [json.loads(line) for line in Path("given/metrics.jsonl").read_text().splitlines()]
    assert [row["config"]["data"]["root"] for row in rows if row["event"] == "start"] == [str(good)]
    assert json.loads(Path("given/classes.json").read_text()) == ["cow", "dog"]
    assert "already holds a run" in train("run.dir=given").err


def test_a_config_that_no_run_wrote_is_not_overwritten(train: Train) -> None:
    Path("given").mkdir()
    Path("given/config.yaml").write_text(CONFIG)
    assert "already holds a run" in train("run.dir=given").err
    assert Path("given/config.yaml").read_text() == CONFIG


def test_auto_prefers_a_run_with_updates_to_a_newer_one_without(train: Train) -> None:
    assert train("run.checkpoint_every=1").status == 0
    [run] = Path("runs/tiny").iterdir()
    (run / "summary.json").unlink()
    empty = run.with_name("99991231-235959")
    empty.mkdir()
    for name in (".lock", "config.yaml"):
        (empty / name).write_text("")
    assert str(run) in train("--resume", "auto").out
    assert (empty / "config.yaml").read_text() == ""


@pytest.mark.parametrize("name", ["last", "best", "step_00000003"])
def test_a_checkpoint_that_a_killed_save_was_replacing_goes_by_its_names(name: str, train: Train) -> None:
    assert train("run.dir=given").status == 0
    saved = Path("given/checkpoints")
    (saved / "step_00000003").rename(saved / f".old-step_00000003-{2**22 + 1}")
    again = train("--resume", str(saved / name), "schedule.steps=4", "schedule.epochs=2")
    assert again.status == 0, again.err
    assert "given" in again.out.splitlines()[-1]
    assert (saved / "last").resolve().name == "step_00000004"


def test_auto_says_that_a_given_run_is_finished_and_begins_a_new_one_by_name(train: Train) -> None:
    assert train("--resume", "auto", "run.dir=given").status == 0
    outcome = train("--resume", "auto", "run.dir=given")
    assert outcome.status == 0
    assert "given is finished" in outcome.out
    assert train("--resume", "auto").status == 0
    assert train("--resume", "auto").status == 0
    assert len(list(Path("runs/tiny").iterdir())) == 2


def test_auto_continues_the_newest_unfinished_run(train: Train) -> None:
    assert train("run.checkpoint_every=1").status == 0
    [run] = Path("runs/tiny").iterdir()
    (run / "summary.json").unlink()
    outcome = train("--resume", "auto", "schedule.epochs=2")
    assert outcome.status == 0, outcome.err
    assert list(Path("runs/tiny").iterdir()) == [run]


def test_path_resumes_a_checkpoint_in_its_run_or_in_a_new_folder(train: Train) -> None:
    assert train("run.dir=given", "run.checkpoint_every=1").status == 0
    second = "given/checkpoints/step_00000002"
    branch = train("--resume", second, "run.dir=data")
    assert branch.status == 0, branch.err
    rows = [json.loads(line) for line in Path("data/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["event"] == "train"] == [3]
    assert train("--resume", second).status == 0
    rows = [json.loads(line) for line in Path("given/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["event"] == "train"] == [1, 2, 3]


def test_a_finished_run_in_a_new_folder_has_the_checkpoint_it_came_from(train: Train) -> None:
    assert train("run.dir=given").status == 0
    assert train("--resume", "given", "run.dir=data").status == 0
    for name in ("last", "best"):
        assert Path("data/checkpoints", name).resolve().name == "step_00000003"


def test_a_run_from_another_checkpoint_that_has_none_itself_is_not_begun_again(train: Train) -> None:
    assert train("run.dir=given", "run.checkpoint_every=1").status == 0
    assert train("--resume", "given/checkpoints/step_00000002", "run.dir=data").status == 0
    shutil.rmtree("data/checkpoints")
    record = Path("data/metrics.jsonl").read_bytes()
    Path("data/summary.json").write_text('{"status": "running"}')
    assert_refused(train("--resume", "auto", "run.dir=data"), "data: ", "step 2", "--resume PATH", "run.dir")
    assert Path("data/metrics.jsonl").read_bytes() == record


@pytest.mark.parametrize(
    ("summary", "left", "sign"),
    [
        ("done", [], "the run ended as done"),
        ("requeue", [], "the run ended as requeue"),
        ("running", ["best"], "its link best is there"),
        ("running", [], "its record goes up to step 3, beyond two saves"),
    ],
)
def test_a_run_whose_checkpoints_are_gone_is_not_begun_again(
    summary: str, left: list[str], sign: str, train: Train
) -> None:
    assert train("run.dir=given", "run.checkpoint_every=1").status == 0
    for path in Path("given/checkpoints").iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in left:
            path.unlink()
    Path("given/summary.json").write_text(json.dumps({"status": summary}))
    record = Path("given/metrics.jsonl").read_bytes()
    assert_refused(train("--resume", "auto", "run.dir=given"), "given: ", sign, "another run.dir")
    assert Path("given/metrics.jsonl").read_bytes() == record


def test_a_run_killed_before_its_first_save_is_begun_again(train: Train) -> None:
    assert train("run.dir=given", "run.checkpoint_every=2").status == 0
    shutil.rmtree("given/checkpoints")
    Path("given/summary.json").write_text('{"status": "running"}')
    assert train("--resume", "auto", "run.dir=given").status == 0


@pytest.mark.parametrize(
    ("change", "part"),
    [("data.batch_size=8", "16 images per update"), ("run.seed=1", "run.seed"), ("model.name=test_resnet2", "model")],
)
def test_checkpoint_of_another_run_is_refused(change: str, part: str, train: Train) -> None:
    assert train("run.dir=given").status == 0
    assert_refused(train("--resume", "given", change), part)


def test_dry_run_prints_the_plan_and_leaves_nothing(train: Train, tmp_path: Path) -> None:
    outcome = train("--dry-run", "model.name=acmix_resnet26", "model.kwargs={stem: cifar, base_width: 8}")
    assert outcome.status == 0, outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]
    for word in ("parameters", "multiply-adds", "updates", "cosine", "memory", "16 path weights"):
        assert word in outcome.out


def test_training_starts_from_weights_with_a_classifier_of_its_own(train: Train, tmp_path: Path) -> None:
    assert train("run.dir=given").status == 0
    root = make_images(tmp_path / "data", {"train": ["ant", "bee"], "val": ["ant", "bee"]})
    outcome = train("data.dataset=folder", f"data.root={root}", "model.checkpoint=given", "schedule.steps=1")
    assert outcome.status == 0, outcome.err
    assert "its classifier is for other classes" in outcome.err


def test_grey_images_train_from_weights_for_colour(train: Train) -> None:
    assert train("run.dir=given", "schedule.steps=1").status == 0
    grey = ["model.kwargs.in_chans=1", "data.mean=0.5", "data.image_size=[24, 16]", "augment.color_jitter=0.4"]
    outcome = train(*grey, "run.dir=data", "model.checkpoint=given", "schedule.steps=1")
    assert outcome.status == 0, outcome.err
    assert "given: its first convolution is for images of 3 channels; adapted to 1" in outcome.err
    assert train(*grey, "run.dir=data", "model.checkpoint=given", "--resume", "auto").status == 0
    assert "at 24 × 16 px" in train(*grey, "--dry-run").out


PRETRAINED = """
import runpy, sys
from pathlib import Path
from huggingface_hub import constants
constants.HF_HUB_OFFLINE, constants.HF_HUB_CACHE = True, "hub"  # as its variables in the environment set them
main = runpy.run_path(sys.argv[1])["main"]
assert main(["--config", "tiny.yaml", "model.kwargs.pretrained=true", "run.dir=run"]) == 2 and not Path("run").exists()
from safetensors.torch import save_file
from acmix import models
weights = models.create_model("test_resnet.r160_in1k").state_dict()
cache = Path("hub", "models--timm--test_resnet.r160_in1k")
for folder in ("refs", "snapshots/0"):
    (cache / folder).mkdir(parents=True)
(cache / "refs" / "main").write_text("0")
save_file(weights, cache / "snapshots" / "0" / "model.safetensors")
model = models.create_model("test_resnet.r160_in1k", 7, pretrained=True, in_chans=1)
summed = weights["conv1.0.weight"].sum(1, keepdim=True)
assert model.get_parameter("conv1.0.weight").allclose(summed) and model.get_classifier().out_features == 7
"""


def test_pretrained_weights_are_used_where_they_are_and_explained_where_they_are_not(
    tmp_path: Path, launcher: Any
) -> None:
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    (tmp_path / "pretrained.py").write_text(PRETRAINED)
    program = launcher.start(tmp_path / "pretrained.py", ROOT / "train.py", folder=tmp_path)
    assert program.wait() == 0, program.errors
    assert program.errors.count("error: ") == 1
    for part in ("model.kwargs.pretrained", "huggingface.co/timm/test_resnet", "model.checkpoint=FILE"):
        assert part in program.errors


def test_refusals_do_not_wait_for_torch(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    program = (
        f"import runpy, sys; main = runpy.run_path({str(ROOT / 'train.py')!r})['main'];"
        "status = main(['--config', 'tiny.yaml', 'optimizer.lr=fast']);"
        "sys.exit(99 if 'torch' in sys.modules else status)"
    )
    answer = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert answer.stderr.startswith("error: command line: optimizer.lr")


def test_launcher_has_no_name_outside_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert launcher_id() is None


def test_a_run_keeps_the_loader_that_auto_came_to(train: Train) -> None:
    assert train("run.dir=run").status == 0
    assert yaml.safe_load(Path("run/config.yaml").read_text())["data"]["loader"] == "resident"
    again = train("run.dir=run", "--resume", "auto", "schedule.steps=4")
    assert (again.status, "data.loader" in again.out) == (0, False)
    assert yaml.safe_load(Path("run/config.yaml").read_text())["data"]["loader"] == "resident"
    changed = train("run.dir=run", "--resume", "auto", "schedule.steps=5", "data.loader=workers")
    assert changed.status == 0
    assert "Changed: data.loader was resident, now workers; the images are augmented by other" in changed.out
