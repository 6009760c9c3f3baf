"""Sets torch up for a run, and describes the machine and the versions it runs with."""

import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from acmix.config import RunConfig
from acmix.cores import cores_per_process
from acmix.process.memory import keep_freed_memory

_CPU = torch.device("cpu")
_PACKAGES = ("acmix", "torch", "torchvision", "timm", "numpy", "triton")


def set_up_torch(run: RunConfig, device: torch.device) -> None:
    """Set threads, the precision of float32 matrix products, determinism and the seed.

    On CUDA, float32 products may use TensorFloat-32, and cuDNN picks the fastest kernels by trial unless
    `run.deterministic`. On a CPU, freed memory is kept for the next step. Unless `run.threads` or OMP_NUM_THREADS says
    how many threads, the processes of a job share the cores among them. Every rank gets the same seed, and so the same
    initial weights.
    """
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), cores_per_process()))
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = not run.deterministic
    elif device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(run.seed)


@dataclass(frozen=True)
class Machine:
    """What a run, a measurement or a drill was made on.

    threads: those torch uses. load: mean number of busy processes over the last minute. gpu: name of the CUDA device in
    use, None on a CPU. cuda: torch's CUDA version, None on a CPU. versions: of Python and packages, None for a package
    that is not installed. git: revision of the source tree, with `+changes` when files differ from it; None outside a
    git checkout. date: date and time in UTC.
    """

    host: str
    system: str
    architecture: str
    processor: str
    cores: int | None
    threads: int
    load: float
    gpu: str | None
    cuda: str | None
    versions: dict[str, str | None]
    git: str | None
    date: str


def describe_machine(device: torch.device = _CPU) -> Machine:
    """Hardware, versions, git revision and date; `device` is the one in use."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return Machine(
        host=platform.node(),
        system=f"{platform.system()} {platform.release()}",
        architecture=platform.machine(),
        processor=_processor_name(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        load=round(os.getloadavg()[0], 2),
        gpu=gpu,
        cuda=torch.version.cuda if gpu else None,
        versions={"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        git=_git_revision(),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def describe_run(device: torch.device, processes: int) -> dict[str, Any]:
    """What the `start` row of a run's log says of the machine, as JSON values."""
    machine = describe_machine(device)
    return {
        "versions": machine.versions,
        "git": machine.git,
        "device": machine.gpu or f"cpu ({machine.architecture})",
        "processes": processes,
        "threads": machine.threads,
        "host": machine.host,
    }


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    try:
        answer = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
