"""Sets torch up for a run, and describes the machine and the versions a run was made with."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from acmix.config import RunConfig

_PACKAGES = ("acmix", "torch", "torchvision", "timm", "numpy")


def set_up_torch(run: RunConfig, device: torch.device) -> None:
    """Threads, float32 matrix products and determinism.

    On CUDA, float32 products may use TensorFloat-32 and cuDNN picks the fastest kernels by trial, unless
    `run.deterministic`. The seed covers the model's initial weights, the same on every rank.
    """
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = not run.deterministic
    torch.manual_seed(run.seed)


def describe(device: torch.device, world_size: int) -> dict[str, Any]:
    """Versions, git revision, device and processes, as JSON values."""
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "git": _git_revision(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "processes": world_size,
        "threads": torch.get_num_threads(),
        "host": platform.node(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """Revision of the source tree, with `+changes` when files differ from it; None outside a git checkout."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    try:
        answer = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
