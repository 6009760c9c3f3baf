"""Hostile files at every entry point: exit 2, one message that names the danger, nothing run or left behind."""

import hashlib
import io
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from acmix.checkpoint.manifest import FileRecord, read_manifest, render_manifest
from acmix.checkpoint.snapshot import Snapshot
from acmix.checkpoint.store import CheckpointStore

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "quickstart.yaml"
PROMISE = "Refused by name with exit status 2; no code runs, nothing is left behind"


class Touch:
    """Creates a file when it is unpickled without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.fixture
def sentinel(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "sentinel"
    yield path
    assert not path.exists(), "code from the file ran"


def zipped(path: Path, sentinel: Path) -> Path:
    torch.save({"model": {"weight": torch.zeros(1)}, "optimizer": Touch(sentinel)}, path)
    return path


def legacy(path: Path, sentinel: Path) -> Path:
    torch.save({"state_dict": Touch(sentinel)}, path, _use_new_zipfile_serialization=False)
    return path


def bare(path: Path, sentinel: Path) -> Path:
    path.write_bytes(pickle.dumps(Touch(sentinel)))
    return path


def checkpoint(path: Path, sentinel: Path) -> Path:
    """A checkpoint folder, inside a run folder, whose manifest agrees with its hostile file."""
    store = CheckpointStore(path, 3, background=False, on_error="stop")
    store.save(Snapshot({"weight": torch.zeros(1)}, None, {}, {"step": 1}), best=True)
    folder = store.folder / "step_00000001"
    hostile = zipped(folder / "training.pt", sentinel).read_bytes()
    record = FileRecord(hashlib.sha256(hostile).hexdigest(), len(hostile))
    (folder / "manifest.json").write_bytes(render_manifest(1, read_manifest(folder) | {"training.pt": record}))
    return folder


TRAPS = {"zipped.pth": zipped, "legacy.pt": legacy, "bare.pkl": bare, "checkpoint": checkpoint}
ENTRIES = {
    "train --resume": ("train.py", "--config", CONFIG, "--resume", "{file}", "run.dir={folder}/run"),
    "model.checkpoint": ("train.py", "--config", CONFIG, "model.checkpoint={file}", "run.dir={folder}/run"),
    "eval --checkpoint": ("eval.py", "--checkpoint", "{file}", "--config", CONFIG),
    "convert_official": (
        "scripts/convert_official.py",
        "{file}",
        "{folder}/x.safetensors",
        "--model",
        "acmix_resnet26",
    ),
}


@pytest.mark.parametrize(
    ("entry", "trap"),
    # Evaluation, conversion and a new run read a checkpoint's weights alone: its training state is not even opened.
    [(entry, trap) for trap in TRAPS for entry in ENTRIES if trap != "checkpoint" or entry == "train --resume"],
)
def test_a_hostile_pickle_is_refused_at_every_entry(
    entry: str, trap: str, tmp_path: Path, sentinel: Path, launcher: Any, report: Callable[..., None]
) -> None:
    file = TRAPS[trap](tmp_path / trap, sentinel)
    program, *arguments = (str(part).format(file=file, folder=tmp_path) for part in ENTRIES[entry])
    before = sorted(tmp_path.rglob("*"))
    ended = launcher.start(ROOT / program, *arguments)
    assert ended.wait() == 2, ended.errors
    assert ended.errors.startswith("error: ")
    assert "refused, its pickle asks for io.open" in ended.errors
    assert "Traceback" not in ended.errors
    assert sorted(tmp_path.rglob("*")) == before
    report("Hostile pickle at an entry point", PROMISE, 1, 1)


def test_a_checkpoint_path_smuggled_into_the_model_arguments_is_refused(
    tmp_path: Path, sentinel: Path, launcher: Any, report: Callable[..., None]
) -> None:
    """timm's create_model would read the file itself."""
    file = zipped(tmp_path / "hostile.pth", sentinel)
    for key in ("checkpoint_path", "pretrained_cfg_overlay.file"):
        ended = launcher.start(
            ROOT / "train.py", "--config", CONFIG, f"run.dir={tmp_path / 'run'}", f"model.kwargs.{key}={file}"
        )
        assert ended.wait() == 2, ended.errors
        assert "model.kwargs" in ended.errors
        assert "Traceback" not in ended.errors
    report("Hostile pickle at an entry point", PROMISE, 2, 2)


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system ['touch {}']",
        "!!python/object/apply:subprocess.check_output [['touch', '{}']]",
        "!!python/object/new:os.system ['touch {}']",
        "!!python/name:os.system",
        "!!python/module:antigravity",
    ],
)
def test_python_tags_in_a_config_are_refused(
    tag: str, tmp_path: Path, sentinel: Path, launcher: Any, report: Callable[..., None]
) -> None:
    config = tmp_path / "hostile.yaml"
    config.write_text(f"model:\n  name: {tag.format(sentinel)}\ndata:\n  dataset: digits\nschedule:\n  epochs: 1\n")
    ended = launcher.start(ROOT / "train.py", "--config", config)
    assert ended.wait() == 2, ended.errors
    assert str(config) in ended.errors
    assert "python/" in ended.errors
    assert "Traceback" not in ended.errors
    report("Python tag in a YAML config", PROMISE, 1, 1)


def test_an_archive_in_place_of_weights_writes_nothing(tmp_path: Path, launcher: Any) -> None:
    """Zip members with a path out of the folder are never extracted."""
    file = tmp_path / "weights.pth"
    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(1)}, buffer)
    file.write_bytes(buffer.getvalue())
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("../../escaped", "x")
    ended = launcher.start(ROOT / "eval.py", "--checkpoint", file, "--config", CONFIG)
    assert ended.wait() == 2, ended.errors
    assert not list(tmp_path.parent.rglob("escaped"))
