"""scripts/gpu_check.sh on a machine that it is not for. What it does with a GPU, it can only show there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the check would run")
def test_without_a_gpu_the_check_fails_at_once_and_says_why(tmp_path: Path) -> None:
    command = [str(ROOT / "scripts" / "gpu_check.sh"), str(tmp_path / "results")]
    environment = os.environ | {"PYTHON": sys.executable}
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2
    assert "no CUDA device" in run.stderr
    assert not (tmp_path / "results").exists()
