"""scripts/gpu_check.sh on a machine that it is not for. What it does with a GPU, it can only show there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TEXT = {"capture_output": True, "text": True, "timeout": 120}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the check would run")
def test_without_a_gpu_the_check_fails_at_once_and_says_why(tmp_path: Path) -> None:
    command = [str(ROOT / "scripts" / "gpu_check.sh"), str(tmp_path / "results")]
    environment = os.environ | {"PYTHON": sys.executable}
    run = subprocess.run(command, env=environment, cwd=tmp_path, **TEXT)
    assert run.returncode == 2
    assert "no CUDA device" in run.stderr
    assert not (tmp_path / "results").exists()


def check(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the check in a shell with `true` for Python, which has every GPU and passes every step."""
    return subprocess.run(["bash", "-c", " ".join(words)], cwd=ROOT, env=os.environ | {"PYTHON": "true"}, **TEXT)


def test_results_that_cannot_be_written_are_refused_before_the_steps() -> None:
    run = check("scripts/gpu_check.sh /proc/results")
    assert run.returncode == 2
    assert "cannot write to /proc/results" in run.stderr
    assert "== tests" not in run.stdout


def test_only_the_steps_asked_for_are_taken(tmp_path: Path) -> None:
    run = check(f"scripts/gpu_check.sh {tmp_path}/results shift_conv suite")
    assert run.returncode == 0, run.stderr
    taken = {path.name for path in (tmp_path / "results").glob("*.txt")} - {"tests.txt", "machine.txt"}
    assert taken == {"suite.txt", *(f"shift_conv_{shape}.txt" for shape in ("64x56", "128x28", "256x14", "512x7"))}
    assert "== tests" not in run.stdout
    refused = check(f"scripts/gpu_check.sh {tmp_path}/others tiels")
    assert refused.returncode == 2
    assert "no step tiels" in refused.stderr


def test_a_reader_that_ends_does_not_end_the_check(tmp_path: Path) -> None:
    run = check(f"scripts/gpu_check.sh {tmp_path}/results | true; exit ${{PIPESTATUS[0]}}")
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "results" / "suite.txt").exists()
