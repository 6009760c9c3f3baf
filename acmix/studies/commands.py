"""The command of a run: as this machine starts it, and as a line to type where torchrun or SLURM starts it."""

import shlex
import sys
from pathlib import Path
from typing import Literal

from acmix.config import as_override
from acmix.studies.plan import Run

Starter = Literal["torchrun", "slurm"]


def command(run: Run, program: Path, threads: int | None = None) -> list[str]:
    """Start the run with this Python; `threads` is its share of the cores, unless the study sets run.threads."""
    share = [as_override("run.threads", threads)] if threads and run.config.run.threads is None else []
    return [sys.executable, str(program), *run.arguments, *share]


def line(run: Run, starter: Starter, study: str, checkout: Path, program: Path) -> str:
    """One line of shell that starts the run, or goes on with it, on all GPUs of a machine or as a SLURM job."""
    arguments = list(run.arguments)
    if starter == "torchrun":
        return shlex.join(["torchrun", "--nproc-per-node", "gpu", str(program), *arguments])
    for part in ("--resume", "auto"):  # the job's script gives it
        arguments.remove(part)
    name = f"{study}-{run.arm}-{run.seed}"
    script = str(checkout / "scripts" / "slurm_train.sbatch")
    make = shlex.join(["mkdir", "-p", str(run.log.parent)])  # SLURM does not make the folder of its output
    return f"{make} && " + shlex.join(["sbatch", "--job-name", name, "--output", str(run.log), script, *arguments])
