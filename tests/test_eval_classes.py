"""A model's score does not depend on how its data is packed: classes are matched by name, from end to end."""

import json
import runpy
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
NAMES = [str(number) for number in range(12)]
CONFIG = """
model: {name: test_resnet}
data: {dataset: folder, root: DATA, image_size: 16, batch_size: 12, num_workers: 0}
augment: {crop: none}
schedule: {epochs: 1}
optimizer: {lr: 0.5}
run: {threads: 1}
"""
SCORE = ("loss", "top1", "top5", "count")
Call = Callable[..., int]


def tar_of(source: Path, target: Path) -> None:
    with tarfile.open(target, "w") as tar:
        tar.add(source, arcname=".")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve classes as folders, as tars and flat with a file of labels; `run`, which was trained on the folders."""
    place, random = tmp_path_factory.mktemp("place"), np.random.default_rng(0)
    for split in ("train", "val"):
        for number in range(36):
            folder = place / "data" / split / NAMES[number % 12]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number:02}.png")
        tar_of(place / "data" / split, place / "data" / f"{split}.tar")
    (place / "flat").mkdir()
    files = sorted((place / "data" / "val").rglob("*.png"), key=lambda path: path.name)
    for path in files:
        shutil.copy(path, place / "flat")
    (place / "labels.csv").write_text("".join(f"{path.name},{path.parent.name}\n" for path in files))
    (place / "names.txt").write_text("\n".join(sorted(NAMES)))
    (place / "truth.txt").write_text("".join(f"{sorted(NAMES).index(path.parent.name) + 1}\n" for path in files))
    (place / "tiny.yaml").write_text(CONFIG.replace("DATA", str(place / "data")))
    assert program("train.py")(["--config", str(place / "tiny.yaml"), f"run.dir={place / 'run'}"]) == 0
    return place


def program(name: str) -> Call:
    main: Call = runpy.run_path(str(ROOT / name))["main"]
    return main


@pytest.fixture
def evaluate(place: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    def run(checkpoint: Path, *overrides: str) -> dict[str, Any]:
        capfd.readouterr()
        config = str(place / "tiny.yaml")
        assert program("eval.py")(["--checkpoint", str(checkpoint), "--config", config, *overrides]) == 0
        out, err = capfd.readouterr()
        return {**json.loads(out.splitlines()[-1]), "stderr": err}

    return run


def logged(run: Path) -> list[Any]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[row[key] for key in SCORE] for row in rows if row["event"] == "eval"]


def test_a_run_scores_the_same_on_folder_tar_and_flat_images(place: Path, evaluate: Any) -> None:
    [expected] = logged(place / "run")
    flat = (f"data.root={place}", "data.val_split=flat")
    for overrides in (
        (),
        ("data.dataset=tar",),
        ("data.class_order=natural",),
        (*flat, f"data.labels={place}/labels.csv"),
        (*flat, f"data.labels={place}/truth.txt", f"data.classes={place}/names.txt"),
    ):
        for checkpoint in (place / "run", place / "run" / "checkpoints" / "last" / "model.safetensors"):
            result = evaluate(checkpoint, *overrides)
            # another order of images adds float32 losses in other batches
            assert [result[key] for key in SCORE[1:]] == expected[1:]
            assert result["loss"] == pytest.approx(expected[0], rel=1e-6)
            assert result["classes"] == {"evaluated": 12, "trained": 12}


def test_loose_weights_are_scored_in_the_order_that_is_said(place: Path, evaluate: Any, tmp_path: Path) -> None:
    [expected] = logged(place / "run")
    weights = load_file(place / "run" / "checkpoints" / "last" / "model.safetensors")
    save_file(weights, tmp_path / "sorted.safetensors")
    natural = [sorted(NAMES).index(name) for name in NAMES]
    head = {name: weights[name][natural] for name in weights if name.startswith("fc.")}
    save_file({**weights, **head}, tmp_path / "natural.safetensors")
    result = evaluate(tmp_path / "sorted.safetensors", "data.dataset=tar")
    assert result["loss"] == pytest.approx(expected[0], rel=1e-6)
    assert "do not say the order of their classes" in result["stderr"]
    result = evaluate(tmp_path / "natural.safetensors", "data.class_order=natural")
    assert result["loss"] == pytest.approx(expected[0], rel=1e-6)
    (tmp_path / "names.json").write_text(json.dumps(NAMES))
    result = evaluate(tmp_path / "natural.safetensors", f"data.classes={tmp_path}/names.json")
    assert result["loss"] == pytest.approx(expected[0], rel=1e-6)
    assert evaluate(tmp_path / "natural.safetensors")["loss"] != pytest.approx(expected[0], rel=1e-3)


def test_loose_weights_for_more_classes_than_the_data_has_need_their_names(
    place: Path, evaluate: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "data" / "val" / "3", tmp_path / "val" / "3")
    shutil.copy(place / "run" / "checkpoints" / "last" / "model.safetensors", tmp_path / "w.safetensors")
    call = ["--checkpoint", f"{tmp_path}/w.safetensors", "--config", f"{place}/tiny.yaml", f"data.root={tmp_path}"]
    assert program("eval.py")(call) == 2
    assert "for 12 classes, the data has 1; name all 12, in order: data.classes=FILE" in capfd.readouterr().err
    result = evaluate(tmp_path / "w.safetensors", f"data.root={tmp_path}", f"data.classes={place}/names.txt")
    assert (result["count"], result["classes"]["evaluated"]) == (3, 1)


def test_a_part_of_the_classes_is_counted_alone_and_said(place: Path, evaluate: Any, tmp_path: Path) -> None:
    for name in ("3", "10"):
        shutil.copytree(place / "data" / "val" / name, tmp_path / "val" / name)
    result = evaluate(place / "run", f"data.root={tmp_path}", "--report", str(tmp_path / "report"))
    whole = evaluate(place / "run", "--report", str(tmp_path / "whole"))
    assert (result["count"], result["classes"]["evaluated"], result["classes"]["trained"]) == (6, 2, 12)
    assert "images of 2 of the 12 classes" in result["stderr"]
    report, full = (json.loads((tmp_path / name / "classes.json").read_text()) for name in ("report", "whole"))
    hits = sum(full[name]["recall"] * full[name]["support"] for name in ("3", "10"))
    assert result["top1"] == pytest.approx(100 * hits / 6)
    assert report["accuracy"] == pytest.approx(hits / 6)
    assert report["macro avg"]["recall"] == pytest.approx((full["3"]["recall"] + full["10"]["recall"]) / 2)
    assert result["classes"]["top1"] >= result["top1"]
    assert result["classes"]["top5"] == 100.0
    assert whole["classes"] == {"evaluated": 12, "trained": 12}


def test_a_run_in_another_order_resumes_and_evaluates_in_it(place: Path, evaluate: Any, tmp_path: Path) -> None:
    """As runs on tars did before: their checkpoints say the natural order."""
    train, config = program("train.py"), ["--config", str(place / "tiny.yaml"), "schedule.epochs=2"]
    tar = ("data.dataset=tar", "run.checkpoint_every=1")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train([*config, *tar, "data.class_order=natural", f"run.dir={whole}"]) == 0
    assert json.loads((whole / "classes.json").read_text()) == NAMES
    assert train([*config, *tar, "data.class_order=natural", "schedule.steps=2", f"run.dir={cut}"]) == 0
    assert train([*config, *tar, "--resume", str(cut)]) == 0
    assert logged(cut)[-1] == logged(whole)[-1]
    ours, theirs = (load_file(run / "checkpoints" / "last" / "model.safetensors") for run in (cut, whole))
    assert all((ours[name] == theirs[name]).all() for name in ours)
    assert json.loads((cut / "classes.json").read_text()) == NAMES
    result = evaluate(whole, "data.dataset=folder", "--weights", "raw")
    assert result["loss"] in [pytest.approx(row[0], rel=1e-6) for row in logged(whole)]


def test_weights_to_start_from_keep_the_numbers_of_the_same_classes(place: Path, tmp_path: Path) -> None:
    natural, after = tmp_path / "natural", tmp_path / "after"
    train, config = program("train.py"), ["--config", str(place / "tiny.yaml")]
    assert train([*config, "data.class_order=natural", f"run.dir={natural}"]) == 0
    start = (f"model.checkpoint={natural}", "optimizer.lr=1e-12", "schedule.steps=1")
    assert train([*config, *start, f"run.dir={after}"]) == 0
    assert json.loads((after / "classes.json").read_text()) == NAMES
