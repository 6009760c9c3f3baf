"""The benchmark's command line."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from acmix.checkpoint.atomic import prove_writable
from acmix.errors import UserError
from acmix.ops.local_attention.implementations import LOCAL_ATTENTION
from acmix.ops.shift_conv.implementations import SHIFT_CONV
from acmix.process.program import Arguments, run_program
from benchmarks import data
from benchmarks.cases import DTYPES, Case, Setting, build_case, is_authors
from benchmarks.machine import Place, machine_row
from benchmarks.measure import MODES, Bench, Result
from benchmarks.page import summary, write_page
from benchmarks.report import table, write_json
from benchmarks.results import Results, Row, measure_rows
from benchmarks.suite import Suite, Target, suite_device
from benchmarks.targets import TARGETS
from benchmarks.timing import use_threads


def run(description: str, out: Path, arguments: Sequence[str] | None = None) -> int:
    """Run the command; `out` is where the suite writes unless told otherwise.

    Returns the exit status: 1 if an implementation failed parity and was not timed, 2 for bad usage.
    """
    given = sys.argv[1:] if arguments is None else arguments
    if any(text.partition("=")[0] == "--data" for text in given):
        return run_program(lambda: data.run(given, description))
    return run_program(lambda: _run(_parser(description, out).parse_args(given)))


def _run(options: argparse.Namespace) -> int:
    device = suite_device(options.device)
    if options.suite:
        return _run_suite(options, device)
    if not options.subjects:
        raise UserError("name a model or block, such as acmix_resnet26 or block:64x56, or --suite")
    return _run_comparison(options, device)


def _parser(description: str, out: Path) -> Arguments:
    parser = Arguments(
        prog="benchmark.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("subjects", nargs="?", metavar="SUBJECT[,SUBJECT...]", help="models, blocks or operations to time")
    add("--against", metavar="SUBJECT", help="what times are divided by, timed in turn with the rest")
    add(
        "--impl",
        default="auto",
        metavar="IMPL[,IMPL...]",
        help="implementations of the operations; `all`: all that run",
    )
    add("--mode", default="train", choices=[*MODES, "both"], help="training step (default), inference, or both")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add("--dtype", default="float32", choices=list(DTYPES), help="autocast to this")
    add("--compile", action="store_true", help="torch.compile everything timed")
    add("--channels-last", action="store_true")
    add("--batch-size", type=_positive, default=4)
    add("--image-size", type=_positive, default=224)
    add(
        "--threads",
        type=_positives,
        metavar="N[,N...]",
        help="CPU threads (default 1); with --suite, only the rows of these numbers (default: all)",
    )
    add("--seconds", type=float, default=5.0, help="time to spend on each subject, about")
    add("--steps", type=_positive, help="number of rounds, instead of --seconds")
    add("--no-memory", action="store_true", help="do not measure peak memory")
    add("--authors", type=Path, metavar="PATH", help="clone of github.com/LeapLabTHU/ACmix, for authors:... subjects")
    add("--photos", type=Path, metavar="FOLDER", help="photographs in class folders, for the suite's rows on loaders")
    add("--cifar", type=Path, metavar="FOLDER", help="CIFAR-10 as JPEG files, FOLDER/{train,test}/CLASS, for the same")
    add("--json", type=Path, metavar="FILE", help="write the results there too")
    add("--data", metavar="CONFIG", help="time the data of a run instead; see --data CONFIG --help")
    add("--suite", action="store_true", help="measure every target of the device; write RESULTS.md and JSON")
    add("--only", metavar="KEY[,KEY...]", help="with --suite, only these rows, such as 'resnet26*'; the others stay")
    add("--out", type=Path, default=out, metavar="FOLDER", help="where the suite writes (default: %(default)s)")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def _positives(text: str) -> list[int]:
    return [_positive(number) for number in text.split(",")]


def _run_suite(options: argparse.Namespace, device: torch.device) -> int:
    targets = _chosen(options.only, device)
    prove_writable("--out", options.out, folder=True)
    results = Results(options.out, Place.of(device), TARGETS)
    suite = Suite(device, options.authors, options.seconds, options.photos, options.cifar)
    print(results.place, flush=True)

    def keep(row: Row) -> None:
        print(summary(row), flush=True)
        results.put(row, suite)
        write_page(options.out, TARGETS)

    rows = measure_rows(suite, keep, targets, options.threads)
    print(f"Wrote {options.out / 'RESULTS.md'} and {results.path.name}")
    return 1 if any("refused" in row for row in rows) else 0


def _chosen(only: str | None, device: torch.device) -> list[Target]:
    """The device's rows that `--only` names. Raises UserError for a name that no row has."""
    here = [target for target in TARGETS if target.device == device.type]
    if only is None:
        return here
    names = only.split(",")
    for name in names:
        if not any(fnmatchcase(target.key, name) for target in here):
            keys = ", ".join(target.key for target in here)
            raise UserError(f"--only {name}: no such row on this device; there are {keys}")
    return [target for target in here if any(fnmatchcase(target.key, name) for name in names)]


def _run_comparison(options: argparse.Namespace, device: torch.device) -> int:
    if options.json:
        prove_writable("--json", options.json)
    bench, results = Bench(), list[Result]()
    use_threads((options.threads or [1])[0])
    machine = machine_row(device)
    for threads in options.threads or [1]:
        setting = Setting(
            device,
            options.dtype,
            options.compile,
            options.channels_last,
            options.batch_size,
            options.image_size,
            threads,
            options.authors,
        )
        cases = _cases(options, setting)
        for mode in MODES if options.mode == "both" else [options.mode]:
            budget = {"seconds": options.seconds, "rounds": options.steps, "memory": not options.no_memory}
            measured = bench.measure(cases, mode=mode, **budget)
            print(table(measured, against=len(cases) - 1 if options.against else None), flush=True)
            results += measured
        print(f"{machine['device']}, {threads} thread(s), torch {machine['versions']['torch']}, {machine['date']}; "
              f"measured roof: {bench.roofline(setting)} (a multiply-add is two operations)")  # fmt: skip
    if options.json:
        write_json({"machine": machine, "results": [result.as_dict() for result in results]}, options.json)
    return 1 if any(result.refused for result in results) else 0


def _cases(options: argparse.Namespace, setting: Setting) -> list[Case]:
    """Every subject with every implementation asked for, then the one to compare with."""
    cases = []
    for subject in options.subjects.split(","):
        for impl in _impls(subject, options.impl):
            case = _runnable(subject, setting, impl, skip=options.impl == "all")
            cases += [case] if case else []
    if options.against:
        base = _runnable(options.against, setting, "auto", skip=False)
        cases += [base] if base else []
    return cases


def _impls(subject: str, wanted: str) -> Sequence[str]:
    if is_authors(subject):
        return ["auto"]
    if wanted == "all":
        return (SHIFT_CONV if subject.startswith("shift_conv:") else LOCAL_ATTENTION).names
    return wanted.split(",")


def _runnable(subject: str, setting: Setting, impl: str, *, skip: bool) -> Case | None:
    """Build a case whose implementation can run; else None with a word about it, or UserError if it was asked for."""
    try:
        build_case(subject, replace(setting, compile=False), impl).infer()
    except ValueError as reason:
        if not skip:
            raise UserError(f"{subject} [{impl}]: {reason}") from None
        print(f"{subject} [{impl}] cannot run: {reason}", file=sys.stderr)
        return None
    return build_case(subject, setting, impl)
