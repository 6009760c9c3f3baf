"""What figures were measured on: a figure without it is worth nothing."""

import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from acmix.process.environment import Machine, describe_machine


@dataclass(frozen=True)
class Place:
    """Device of a table of results.

    kind: cpu or cuda. name: of the GPU, or of the processor with the numbers of its generation where Linux gives them,
    because a virtual machine's name for it may hide that. instructions: vector instructions that PyTorch uses on the
    processor; empty for a GPU. cores: logical processors.
    """

    kind: str
    name: str
    instructions: str
    cores: int | None

    @classmethod
    def of(cls, device: torch.device) -> "Place":
        machine = describe_machine(device)
        if machine.gpu:
            return cls(device.type, machine.gpu, "", machine.cores)
        return cls(device.type, machine.processor + _generation(), _instructions(), machine.cores)

    def __str__(self) -> str:
        device = "GPU" if self.kind == "cuda" else self.instructions
        return f"{self.name}, {device}, {self.cores} cores"

    @property
    def file(self) -> str:
        """Name of the file of its results: one for each model and instruction set."""
        words = re.findall(r"[a-z0-9]+", f"{self.name} {self.instructions}".lower())
        return f"results-{self.kind}-{'-'.join(words)}.json"


def machine_row(device: torch.device) -> dict[str, Any]:
    """Machine, versions, revision and date of a measurement, as JSON values."""
    machine = describe_machine(device)
    place = Place.of(device)
    return {
        "device": place.name,
        "instructions": place.instructions,
        "cores": machine.cores,
        "threads": machine.threads,
        "cuda": machine.cuda,
        **_occasion(machine),
    }


def occasion_row(device: torch.device) -> dict[str, Any]:
    """Revision, versions, date and load of a measurement, as JSON values."""
    return _occasion(describe_machine(device))


def _occasion(machine: Machine) -> dict[str, Any]:
    return {
        "revision": machine.git,
        "date": machine.date,
        "load": machine.load,
        "versions": {name: number for name, number in machine.versions.items() if number is not None},
    }


def _generation() -> str:
    """Family and model of the processor, such as " (family 25, model 17)"; empty where they are not told."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    if "cpu family" not in facts or "model" not in facts:
        return ""
    return f" (family {facts['cpu family']}, model {facts['model']})"


def _instructions() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    is_arm = platform.machine().lower() in ("aarch64", "arm64")
    return "NEON" if is_arm and capability == "DEFAULT" else capability
