"""How long a background save holds up training, compared with how long the save takes.

    python -m benchmarks.saves [--model acmix_resnet26] [--device cpu] [--saves 15]

A full state is saved repeatedly: weights, their running average, SGD's momentum. `stall` is how long the training loop
waits in save(); `save` is the time until the checkpoint is on disk. Medians; the first save is shown separately.
Exit status: 0 done, 2 bad usage.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from acmix import models
from acmix.checkpoint.atomic import prove_writable
from acmix.checkpoint.snapshot import Snapshot
from acmix.checkpoint.store import CheckpointStore
from acmix.errors import UserError
from acmix.process.program import Arguments, run_program
from benchmarks.machine import machine_row


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_program(lambda: run(arguments))


def run(arguments: Sequence[str] | None) -> int:
    """Time the saves and print the figures; returns the exit status."""
    parser = Arguments(
        prog="python -m benchmarks.saves", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="acmix_resnet26", metavar="NAME", help="network whose state is saved")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where the state is")
    parser.add_argument("--saves", type=int, default=15, metavar="N", help="number of saves")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="disk to save to (default: the temporary folder)")
    options = parser.parse_args(arguments)
    if options.saves < 2:
        raise UserError(f"--saves: must be at least 2, got {options.saves}")
    if options.folder is not None:
        prove_writable("--folder", options.folder, folder=True)
        options.folder.mkdir(parents=True, exist_ok=True)
    device = torch.device(options.device)
    network = models.create_model(options.model).to(device)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        stalls, saves, size = measure(network, Path(folder), options.saves)
    share = statistics.median(stall / save for stall, save in zip(stalls[1:], saves[1:], strict=True))
    print(f"{options.model}: {size / 2**20:.0f} MiB a checkpoint, {options.saves} saves")
    print(f"first: stall {stalls[0] * 1e3:.1f} ms, save {saves[0] * 1e3:.0f} ms")
    stall, save = statistics.median(stalls[1:]), statistics.median(saves[1:])
    print(f"others: stall {stall * 1e3:.1f} ms, save {save * 1e3:.0f} ms: {share:.1%} of a save")
    print(*(f"{key}: {value}" for key, value in machine_row(device).items()), sep="\n")
    return 0


def measure(network: nn.Module, folder: Path, count: int) -> tuple[list[float], list[float], int]:
    """Seconds of each stall and of each whole save, and the size of a checkpoint in bytes."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    average = {name: tensor.clone() for name, tensor in network.state_dict().items()}

    def snapshot(step: int) -> Snapshot:
        return Snapshot(network.state_dict(), average, {"optimizer": optimizer.state_dict()}, {"step": step})

    store = CheckpointStore(folder, 3, background=True, on_error="stop")
    store.reserve(snapshot(0))
    stalls, saves = [], []
    for step in range(1, count + 1):
        store.wait()
        state = snapshot(step)
        began = time.perf_counter()
        store.save(state, best=False)
        stalls.append(time.perf_counter() - began)
        store.wait()
        saves.append(time.perf_counter() - began)
    newest = folder / "checkpoints" / f"step_{count:08d}"
    return stalls, saves, sum(file.stat().st_size for file in newest.iterdir())


if __name__ == "__main__":
    sys.exit(main())
