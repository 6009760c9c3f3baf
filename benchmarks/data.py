"""Whether the data makes the model wait: a config's loader alone, its model alone, both; and timm's loader in turn."""

import argparse
import time
from collections.abc import Iterable, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch

from acmix import models
from acmix.checkpoint.atomic import prove_writable
from acmix.config import Config, load_config
from acmix.data.batch import Batch
from acmix.data.loader import build_data, resolve_num_classes
from acmix.data.transforms import build_mixup
from acmix.data.workers import worker_count
from acmix.engine.learner import Learner
from acmix.errors import UserError
from acmix.process.distributed import Distributed
from acmix.process.environment import set_up_torch
from acmix.process.program import Arguments
from benchmarks.machine import machine_row
from benchmarks.rates import Rate, loader_rates, our_epoch, timm_epoch
from benchmarks.report import columns, write_json
from benchmarks.timing import Samples

UPDATES = 16
ROUNDS = 5


def run(arguments: Sequence[str], description: str) -> int:
    """The command `--data CONFIG`; returns the exit status. Raises UserError."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = Arguments(prog="benchmark.py", description=description, formatter_class=shape)
    add = parser.add_argument
    add("--data", required=True, metavar="CONFIG", help="YAML file of the run whose data is timed")
    add("overrides", nargs="*", metavar="KEY.PATH=VALUE", help="config values to override")
    add("--against", choices=["timm"], help="time timm.data.create_loader on the same images in turn")
    add("--updates", type=int, default=UPDATES, help="updates of each round, from the start of an epoch (%(default)s)")
    add("--rounds", type=int, default=ROUNDS, help="rounds, in which every side is timed in turn (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the results there too")
    options = parser.parse_intermixed_args(arguments)
    if min(options.updates, options.rounds) < 1:
        raise UserError("--updates and --rounds must be at least 1")
    if options.json:
        prove_writable("--json", options.json)
    config = load_config(options.data, options.overrides)
    with Distributed.start(config.run) as dist:
        set_up_torch(config.run, dist.device)
        machine = machine_row(dist.device)
        rates = measure_config(config, dist, options.updates, options.rounds, timm=options.against == "timm")
    print(table(rates))
    print(f"{machine['device']}, {machine['cores']} cores, {worker_count(config)} loader processes, "
          f"{machine['threads']} thread(s), {machine['date']}")  # fmt: skip
    if options.json:
        values = [rate.as_dict() for rate in rates]
        write_json({"machine": machine, "config": config.model_dump(mode="json"), "rates": values}, options.json)
    return 0


def measure_config(config: Config, dist: Distributed, updates: int, rounds: int, *, timm: bool) -> list[Rate]:
    """The loader alone, timm's, the model alone, and both. Raises UserError."""
    data = build_data(config)
    updates = min(updates, data.train.updates_per_epoch)
    width = resolve_num_classes(config, data)
    kwargs: dict[str, Any] = config.model.kwargs | {"image_size": config.data.size, "pretrained": False}
    model = models.create_model(config.model.name, width, **kwargs).train()
    learner = Learner(config, model, dist, data.train, mixing=build_mixup(config, data.num_classes))
    ours = our_epoch(config, data, dist.device)
    sides = {data.train.images.kind: ours} | ({"timm": timm_epoch(config, dist.device)} if timm else {})
    images = updates * data.train.global_batch
    rates = loader_rates(sides, images, updates, rounds)
    held = list(islice(ours(0), 1)) * updates
    alone, both = Training(learner, dist.device), Training(learner, dist.device)
    alone.run(held[:1], images)
    for number in range(rounds):
        alone.run(held, images)
        both.run(islice(ours(number), updates), images)
    return [*rates, alone.rate("model", first=1), both.rate("both", first=0, waits=True)]


class Training:
    """Real updates of a model, with the time spent waiting for their batches."""

    def __init__(self, learner: Learner, device: torch.device) -> None:
        self._learner = learner
        self._device = device
        self._steps = count(1)
        self._rates: list[float] = []
        self._waiting: list[float] = []

    def run(self, updates: Iterable[list[Batch]], images: int) -> None:
        """Take every update."""
        started, waited = self._now(), 0.0
        batches = iter(updates)
        while True:
            asked = self._now()
            update = next(batches, None)
            waited += time.perf_counter() - asked
            if update is None:
                break
            step = next(self._steps)
            self._learner.gradients(update, step)
            self._learner.update(step)
        spent = self._now() - started
        self._rates.append(images / spent)
        self._waiting.append(waited / spent)

    def rate(self, name: str, *, first: int, waits: bool = False) -> Rate:
        """What was measured from the round `first` on."""
        waiting = Samples(tuple(self._waiting[first:])) if waits else None
        return Rate(name, Samples(tuple(self._rates[first:])), waiting)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def table(rates: Sequence[Rate]) -> str:
    """Rates in columns; of loaders, also as multiples of timm's."""
    timm = next((rate for rate in rates if rate.name == "timm"), None)
    rows = [["", "images/s", "spread", "n", "waiting", "× timm"]]
    for rate in rates:
        found = rate.images_per_second
        row = [rate.name, f"{found.median:,.1f}", f"{found.spread:,.1f}", str(found.n)]
        row.append("" if rate.waiting is None else f"{rate.waiting.median:.1%}")
        alone = timm is not None and rate.waiting is None and rate.name != "model"
        row.append(f"{found.over(timm.images_per_second).median:.2f}" if alone and timm is not None else "")
        rows.append(row)
    return columns(rows)
