"""A program that does nothing but save: every value of checkpoint N is N, so a mixture of two saves shows.

Goes on from the newest sound checkpoint of RUN_DIR; prints `resumed N`, then `saved N` once a save is on disk.
"""

import argparse
import os
import resource
import sys
from pathlib import Path

import torch

from acmix.checkpoint.read import load_checkpoint
from acmix.checkpoint.snapshot import Snapshot
from acmix.checkpoint.store import CheckpointStore
from acmix.engine.lock import RunLock
from acmix.errors import UserError


def make_snapshot(step: int, size: int) -> Snapshot:
    """Weights, EMA and momentum of `size` values each, all equal to the step."""
    values = torch.full((size,), float(step))
    return Snapshot({"w": values}, {"w": values}, {"momentum": values}, {"step": step})


def say(line: str) -> None:
    """Write a line with a single call, so that no kill leaves half of it."""
    os.write(sys.stdout.fileno(), f"{line}\n".encode())


def save_all(options: argparse.Namespace) -> None:
    store = CheckpointStore(options.run_dir, options.keep, background=options.background, on_error=options.on_error)
    newest = store.newest()
    done = load_checkpoint(newest).step if newest else 0
    store.rewind(done)
    say(f"resumed {done}")
    for step in range(done + 1, options.steps + 1):
        size = options.size * (1000 if step == options.big_step else 1)
        for _ in range(options.times):
            store.save(make_snapshot(step, size), best=step % 5 == 0)
            if not options.leave:
                store.wait()
        if (store.folder / f"step_{step:08d}").is_dir():
            say(f"saved {step}")
    if not options.leave:
        say(f"holds {' '.join(sorted(os.listdir(store.folder)))} newest {load_checkpoint(options.run_dir).step}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--size", type=int, default=1000)
    parser.add_argument("--keep", type=int, default=2)
    parser.add_argument("--times", type=int, default=1, help="save each step so many times")
    parser.add_argument("--background", action="store_true")
    parser.add_argument("--leave", action="store_true", help="end without waiting for the last save")
    parser.add_argument("--on-error", default="stop")
    parser.add_argument("--big-step", type=int, help="this step's checkpoint is 1000 times as large")
    parser.add_argument("--file-size-limit", type=int)
    parser.add_argument("--user", type=int)
    arguments = parser.parse_args()
    if arguments.file_size_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (arguments.file_size_limit, arguments.file_size_limit))
    if arguments.user:
        os.setuid(arguments.user)
    try:
        with RunLock(arguments.run_dir):
            save_all(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
