"""`scripts/check_data.py` from the command line."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "check_data.py"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes in two splits, three images each."""
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for number in range(3):
                Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "data"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=SCRIPT.parent)


def test_a_sound_folder_exits_0_and_writes_the_report(root: Path, tmp_path: Path) -> None:
    done = run(root, "--json", tmp_path / "report.json", "--workers", 2)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["files"], report["problems"]) == (12, [])
    assert "12 images read" in done.stdout


def test_what_would_stop_a_run_exits_2_and_is_listed(root: Path, tmp_path: Path) -> None:
    (root / "train" / "cat" / "0.png").write_bytes(b"")
    (root / "val" / "dog" / "1.JPEG").write_bytes((root / "val" / "dog" / "1.png").read_bytes())
    (root / "val" / "eel").mkdir()
    done = run(root, "--json", tmp_path / "report.json")
    assert done.returncode == 2
    problems = {
        (p["path"], p["kind"], p["fatal"]) for p in json.loads((tmp_path / "report.json").read_text())["problems"]
    }
    assert problems == {
        (f"{root}/train/cat/0.png", "empty", True),
        (f"{root}/val/dog/1.JPEG", "misnamed", False),
        (f"{root}/val/eel", "empty_class", True),
        (f"{root}/val/eel", "class_mismatch", True),
    }
    for path, kind, _ in problems:
        assert any(path in line and kind in line for line in done.stdout.splitlines())
    assert "Traceback" not in done.stderr


def test_harmless_problems_alone_exit_0(root: Path) -> None:
    (root / "train" / "cat" / "notes.txt").write_text("hello")
    done = run(root)
    assert done.returncode == 0
    assert "not_image" in done.stdout


def test_bad_usage_exits_2_with_one_message(root: Path, tmp_path: Path) -> None:
    for arguments in (
        [tmp_path / "gone"],
        [root, "--val-split", "holdout"],
        [root, "--workers", -1],
        [root, "--bogus"],
        [],
        [root, "--json", "/proc/no/where.json"],
        [root, "--json", root / "val" / "cat" / "0.png"],
    ):
        done = run(*arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert len(done.stderr.strip().splitlines()) == 1
