"""Draw what a probe measured, by depth and over training; by default the path weights: alpha, beta and log|alpha/beta|.

    python scripts/plot_paths.py RUN [RUN ...] --out FILE.png|.svg|.pdf [--probe NAME] [--title TEXT]

Several runs (seeds) of one model are drawn as mean ± standard deviation. Where runs have unequal lengths, the mean ends
with the shortest of them, and the longer ones go on as thin lines of their own.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from acmix.process.program import Arguments, run_program
from acmix.telemetry.figure_file import check_figure_file, drawn_text, save_figure
from acmix.telemetry.history import common_end, read_runs
from acmix.telemetry.plot import describe, draw, layout


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, 2 for bad usage or input."""
    return run_program(lambda: plot(arguments))


def plot(arguments: Sequence[str] | None) -> int:
    """Read the runs and write the picture. Raises UserError."""
    parser = Arguments(prog="plot_paths.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run folder, the one that holds metrics.jsonl"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="picture to write: .png, .svg or .pdf")
    parser.add_argument("--probe", default="paths", metavar="NAME", help="whose rows to draw (paths)")
    parser.add_argument("--title", help="headline; by default the model and the number of runs")
    options = parser.parse_args(arguments)
    check_figure_file("--out", options.out)
    runs = read_runs(options.runs, options.probe)
    save_figure(draw(runs, None if options.title is None else drawn_text(options.title)), options.out)
    shown = f"{describe(runs)}, {len(runs[0].layers)} {layout(runs[0]).unit}s, up to step {common_end(runs):.0f}"
    print(f"Wrote {options.out}: {shown}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
