"""Report training runs as one self-contained page: results, curves, paths, lesions, classes, mistakes.

    python scripts/report.py RUN [RUN ...] --out FILE.html [--images N | --no-evaluation]

RUN is a run folder, finished or not. Runs whose configs differ only in run.seed and run.dir are seeds of one arm: mean
± standard deviation. Lesions, the confusion matrix and the mistakes are measured on N of the validation images, evenly
spaced, where the run's data can be opened; what is missing is said on the page. Exit status: 0 done; 2 bad usage or
input; 1 anything else.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from acmix.checkpoint.atomic import prove_writable
from acmix.errors import UserError
from acmix.process.program import Arguments, run_program, whole_number
from acmix.report.collect import Arm, Run, collect
from acmix.report.evaluation import Evaluation, evaluate_run
from acmix.report.page import write_page


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report; returns the exit status, 2 for bad usage or input."""
    return run_program(lambda: report(arguments))


def report(arguments: Sequence[str] | None) -> int:
    """Read, evaluate and write as the command line says. Raises UserError."""
    parser = Arguments(prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.html", help="the page to write")
    much = parser.add_mutually_exclusive_group()
    much.add_argument("--images", type=whole_number, default=2000, metavar="N", help="validation images (2000)")
    much.add_argument("--no-evaluation", action="store_true", help="only what the runs logged: quick, opens no data")
    options = parser.parse_args(arguments)
    if options.out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {options.out}: the name must end in .html")
    arms = collect(options.runs)
    prove_writable("--out", options.out)
    typed = shlex.join(sys.argv[1:] if arguments is None else arguments)
    found = _evaluate(arms, None if options.no_evaluation else options.images)
    write_page(options.out, arms, found, f"python scripts/report.py {typed}")
    print(f"Wrote {options.out} ({options.out.stat().st_size / 1e6:.2f} MB)")
    return 0


def _evaluate(arms: Sequence[Arm], images: int | None) -> dict[Run, Evaluation | str]:
    """Each run's evaluation, or why there is none."""
    found: dict[Run, Evaluation | str] = {}
    for arm in arms:
        for run in arm.runs:
            if images is None:
                found[run] = "--no-evaluation leaves it out"
                continue
            print(f"Evaluating {run.folder}", file=sys.stderr, flush=True)
            try:
                found[run] = evaluate_run(run.folder, images)
            except UserError as error:
                found[run] = str(error)
                print(f"note: {run.folder} is not evaluated: {error}", file=sys.stderr, flush=True)
    return found


if __name__ == "__main__":
    sys.exit(main())
