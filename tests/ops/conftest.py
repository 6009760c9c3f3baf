"""What the tests of the Triton kernels share."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import triton
from torch.torch_version import TorchVersion

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def pass_in_interpreter() -> Callable[[str, int], None]:
    """Run the functions check_* of a file in Triton's interpreter, in a process of its own; so many must pass."""
    if TorchVersion(triton.__version__) < (3, 7) and TorchVersion(numpy.__version__) >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 cannot take loop bounds from a tensor with NumPy 2.4 or newer")

    def run(file: str, count: int) -> None:
        options = ["-q", "-p", "no:cacheprovider", "-o", "python_functions=check_*"]
        command = [sys.executable, "-m", "pytest", *options, file]
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        assert f"{count} passed" in done.stdout

    return run
