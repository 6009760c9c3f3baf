"""How rows of the target table are measured that are about whole runs: the training loop, the quickstart, its start."""

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from acmix.config import Config, load_config
from acmix.data.loader import build_data
from acmix.engine.run_folder import METRICS, SUMMARY, choose_run
from acmix.models import create_model
from acmix.process.signals import StopSignals
from acmix.telemetry.record import read_rows
from benchmarks.probes import measure, period, shares
from benchmarks.suite import BrokenError, Figure, Suite
from benchmarks.timing import Samples, use_threads

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
_UNCHANGED = ("augment.crop=none", "augment.hflip=0")  # images as they lie in memory


def trainer(
    suite: Suite, threads: int, *, window: int = 10, rounds: int = 5, overrides: Sequence[str] = _UNCHANGED
) -> Figure:
    """Images a second of a run over those of a bare loop with the same model, optimizer and data, in turn.

    Each side takes twice `window` steps a round, of which the second half counts: the bare loop's by the clock, the
    run's as it logs them, evaluation and saves left out. A first round, in which C++ may be compiled, does not count.
    """
    how = [*overrides, "run.device=cpu", f"run.threads={threads}"]
    how += [f"schedule.steps={2 * window}", f"run.log_every={window}"]
    ratios, waits = [], []
    for _ in range(1 + rounds):
        with tempfile.TemporaryDirectory() as folder:
            config = load_config(QUICKSTART, [*how, f"run.dir={folder}/run"])
            row = _train(config)
        ratios.append(row["images_per_second"] / _bare_loop(config, window))
        waits.append(row["data_wait"])
    note = f"quickstart's model and data, not augmented; {max(waits[1:]):.1%} of the run's time spent waiting for data"
    return Figure(Samples(tuple(ratios[1:])), note=note)


def quickstart_seconds(suite: Suite, threads: int) -> Figure:
    """Wall time of the quickstart."""
    return Figure(Samples((_quickstart(threads)[0],)), note="one run, from the start of the process to its end")


def quickstart_accuracy(suite: Suite, threads: int) -> Figure:
    """Its accuracy at the end, in percent."""
    return Figure(Samples((_quickstart(threads)[1],)), note="the same run, after its last epoch")


def first_step(suite: Suite, threads: int, *, rounds: int = 5) -> Figure:
    """Seconds from the start of the process to the row of the first step, all that is compiled being in the cache."""
    seconds = [seconds_to_first_step(threads) for _ in range(1 + rounds)]
    return Figure(
        Samples(tuple(seconds[1:])), note="quickstart; the first of six starts, which warms the caches, left out"
    )


def probes_cost(suite: Suite, threads: int, *, rounds: int = 7) -> Figure:
    """Time of the default probes over that of the steps between their measurements, in percent."""
    use_threads(threads)
    config = load_config(QUICKSTART, [])
    probes, seconds = measure(config, torch.device("cpu"), rounds)
    told = ", ".join(f"{probe.name} every {period(probe, config)} steps" for probe in probes)
    return Figure(Samples(tuple(100 * share for share in shares(config, probes, seconds))), note=f"quickstart; {told}")


def seconds_to_first_step(threads: int, *overrides: str, config: Path = QUICKSTART, cache: Path | None = None) -> float:
    """From the start of train.py to the row of its first step; `cache`: the folder it keeps things in, if not the
    usual one."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.time()  # the clock of the rows
        steps = ("run.log_every=1", "schedule.steps=1")
        _launch(Path(folder, "run"), threads, *steps, *overrides, config=config, cache=cache)
        (row,) = (row for row in read_rows(Path(folder, "run", METRICS)) if row["event"] == "train")
    return float(row["time"] - began)


@cache
def _quickstart(threads: int) -> tuple[float, float]:
    """Seconds of one run of the quickstart and its last top-1 in percent."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        _launch(Path(folder, "run"), threads)
        seconds = time.perf_counter() - began
        summary = json.loads(Path(folder, "run", SUMMARY).read_text(encoding="utf-8"))
    return seconds, summary["last"]["top1"]


def _launch(folder: Path, threads: int, *overrides: str, config: Path = QUICKSTART, cache: Path | None = None) -> None:
    """Train as a user would, on so many cores of this machine. Raises BrokenError where it fails."""
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(config)]
    command += [f"run.dir={folder}", "run.device=cpu", *overrides]
    environment = os.environ | ({} if cache is None else {"ACMIX_CACHE": str(cache)})
    with _cores(threads):
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise BrokenError(f"train.py ended with status {done.returncode}: {' '.join(last)}")


@contextmanager
def _cores(count: int) -> Iterator[None]:
    """Processes started meanwhile may use only the first `count` of the cores that this one may use."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _train(config: Config) -> dict[str, Any]:
    """Train in this process, as train.py does; returns the last row of the log that tells of training."""
    import train

    with redirect_stdout(io.StringIO()):
        status = train.train(config, choose_run(config, "none"), StopSignals(), dry_run=False)
    if status:
        raise BrokenError(f"the run ended with status {status}")
    return [row for row in read_rows(Path(str(config.run.dir), METRICS)) if row["event"] == "train"][-1]


def _bare_loop(config: Config, window: int) -> float:
    """Images a second of the shortest loop that trains the config's model on its data, held in memory."""
    batches = _batches(config)
    torch.manual_seed(config.run.seed)
    model = create_model(config.model.name, 10, image_size=config.data.size, **config.model.kwargs).train()
    settings = config.optimizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    images_done = 0
    for step, (images, targets) in enumerate(batches):
        if step == window:
            began = time.perf_counter()
        images_done += len(images) if step >= window else 0
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    return images_done / (time.perf_counter() - began)


def _batches(config: Config) -> list[tuple[Tensor, Tensor]]:
    updates = islice(build_data(config).train.epoch(0), config.schedule.steps)
    return [(batch.images, batch.targets) for (batch,) in updates]
