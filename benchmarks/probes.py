"""What the probes of a config cost, as a share of training time.

    python -m benchmarks.probes --config FILE [--device cpu] [--rounds 7] [KEY.PATH=VALUE ...]

Training steps and measurements take turns on random images of the config's size; medians, on one thread on a CPU. The
share is a probe's time over that of the steps from one measurement to the next, `run.log_every` or `paths.every` of
them; data loading, logging and checkpoints are left out, so in a whole run the share is smaller. Exit status: 0 done, 2
bad usage or config.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from acmix import models
from acmix.config import Config, load_config
from acmix.layers.mix import path_weights
from acmix.process.program import Arguments, run_program, whole_number
from acmix.telemetry.probes import Probe, find_probes
from benchmarks.machine import machine_row
from benchmarks.timing import use_threads


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_program(lambda: run(arguments))


def run(arguments: Sequence[str] | None) -> int:
    """Time steps and probes and print the figures; returns the exit status."""
    parser = Arguments(
        prog="python -m benchmarks.probes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="config whose probes are timed")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where the network is")
    parser.add_argument("--rounds", type=whole_number, default=7, metavar="N", help="steps and measurements (7)")
    parser.add_argument("overrides", nargs="*", metavar="KEY.PATH=VALUE", help="config values to override")
    options = parser.parse_intermixed_args(arguments)
    config = load_config(options.config, options.overrides)
    device = torch.device(options.device)
    use_threads(1)
    probes, seconds = measure(config, device, options.rounds)
    step = statistics.median(seconds["step"])
    size = config.data.batch_size
    print(f"{options.config}: a step of {size} images takes {1e3 * step:.1f} ms, {options.rounds} each")
    for probe in probes:
        taken, every = statistics.median(seconds[probe.name]), period(probe, config)
        print(f"{probe.name}: {1e3 * taken:.1f} ms every {every} steps, {taken / (every * step):.2%} of training")
    total = statistics.median(shares(config, probes, seconds))
    print(f"all: {total:.2%}", *(f"{key}: {value}" for key, value in machine_row(device).items()), sep="\n")
    return 0


def measure(config: Config, device: torch.device, rounds: int) -> tuple[list[Probe], dict[str, list[float]]]:
    """The probes of a config, and the seconds of each measurement, by name, and of each "step", all in turn."""
    network = models.create_model(config.model.name, 10, image_size=config.data.size, **config.model.kwargs).to(device)
    gradients = {name: torch.zeros((), device=device) for name in path_weights(network)}
    given: dict[str, Any] = {"images": _images(config.paths.images, config, device), "gradients": gradients}
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4)
    images = _images(config.data.batch_size, config, device)
    targets = torch.arange(len(images), device=device) % 10

    def step() -> None:
        F.cross_entropy(network(images), targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    probes = list(find_probes(config.run.probes, config.paths.every))
    tasks: dict[str, Callable[[], Any]] = {"step": step}
    tasks |= {probe.name: partial(probe.rows, network, given.__getitem__) for probe in probes}
    return probes, _seconds(tasks, rounds, device)


def period(probe: Probe, config: Config) -> int:
    """Steps from one measurement of a probe to the next."""
    return probe.every or config.run.log_every


def shares(config: Config, probes: Sequence[Probe], seconds: dict[str, list[float]]) -> list[float]:
    """Of each round: the time of all probes over that of the steps from one measurement to the next."""
    return [
        sum(seconds[probe.name][i] / (period(probe, config) * step) for probe in probes)
        for i, step in enumerate(seconds["step"])
    ]


def _images(count: int, config: Config, device: torch.device) -> torch.Tensor:
    return torch.randn(count, config.model.in_chans, *config.data.size, device=device)


def _seconds(tasks: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each task in each round, in turns; a first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(rounds + 1):
        for name, task in tasks.items():
            began = time.perf_counter()
            task()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
