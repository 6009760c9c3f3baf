"""Read a whole image folder and list every file and folder that would stop or mislead a run.

    python scripts/check_data.py ROOT [--json FILE] [--train-split NAME] [--val-split NAME] [--workers N]

ROOT holds train/CLASS/* and val/CLASS/* (or validation, valid, test), or the class folders themselves.
Exit status: 0 nothing that would stop a run; 2 something would, or bad usage.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from acmix.checkpoint.atomic import prove_writable, write_atomically
from acmix.data.check import check_folder
from acmix.data.folders import readable_name
from acmix.errors import UserError
from acmix.process.program import BAD_USAGE, Arguments, run_program


def main(arguments: Sequence[str] | None = None) -> int:
    """Check a folder as the command line says; returns the exit status."""
    return run_program(lambda: check(arguments))


def check(arguments: Sequence[str] | None) -> int:
    """Read the folder, write the report, return 2 when something in it would stop a run. Raises UserError."""
    parser = Arguments(prog="check_data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, metavar="ROOT", help="folder with the splits, or with the classes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there, too")
    parser.add_argument("--train-split", metavar="NAME", help="subfolder with the training images (train)")
    parser.add_argument("--val-split", metavar="NAME", help="subfolder with the validation images (val, ...)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that read (all cores)")
    options = parser.parse_args(arguments)
    if options.workers < 0:
        raise UserError(f"--workers: must be at least 0, got {options.workers}")
    if options.json is not None:
        inside = options.json.is_file() and options.json.resolve().is_relative_to(options.root.resolve())
        if inside and options.json.suffix != ".json":  # the report of an earlier call may be
            raise UserError(f"--json {options.json}: would replace a file of {options.root}; choose another place")
        prove_writable("--json", options.json)
    report = check_folder(options.root, options.train_split, options.val_split, options.workers, _progress)
    for problem in report.problems:
        path, detail = readable_name(problem.path), readable_name(problem.detail)
        print(f"{'FATAL' if problem.fatal else 'note '} {problem.kind:15} {path}: {detail}")
    counts = ", ".join(f"{count} {kind}" for kind, count in report.to_json()["counts"].items()) or "no problems"
    verdict = "would stop a run" if report.fatal else "nothing that would stop a run"
    print(f"{report.files} images read in {options.root}: {counts}; {verdict}", flush=True)
    if options.json is not None:
        write_atomically(options.json, json.dumps(report.to_json(), indent=2) + "\n", make_parents=True)
    return BAD_USAGE if report.fatal else 0


def _progress(items: Iterator[Any], total: int) -> Iterator[Any]:
    return iter(tqdm(items, total=total, unit="image", disable=not sys.stderr.isatty()))


if __name__ == "__main__":
    sys.exit(main())
