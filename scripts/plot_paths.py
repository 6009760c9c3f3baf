"""Draw what the paths of ACmix blocks weigh: alpha, beta and log|alpha/beta| against depth and over training.

    python scripts/plot_paths.py RUN [RUN ...] --out FILE.png|.svg|.pdf [--title TEXT]

Several runs (seeds) of one model are drawn as mean ± standard deviation. Where runs have unequal lengths, the mean ends
with the shortest of them, and the longer ones go on as thin lines of their own.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from acmix.errors import UserError
from acmix.telemetry.history import Array, PathHistory, read_paths

# Okabe and Ito's palette, told apart with any colour vision; line style and marker say the same once more.
BLUE, VERMILLION, INK, GREY = "#0072B2", "#D55E00", "#333333", "#777777"
STAGES = ("#000000", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442")
NAMES = {"alpha": "α, attention", "beta": "β, convolution"}
LINES = {"alpha": "-", "beta": "--"}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.edgecolor": INK,
    "legend.frameon": False,
    "svg.hashsalt": "acmix",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, 2 for bad usage or input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run folder, the one that holds metrics.jsonl"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="picture to write: .png, .svg or .pdf")
    parser.add_argument("--title", help="headline; by default the model and the number of runs")
    options = parser.parse_args(arguments)
    try:
        check_output(options.out)
        runs = read_runs(options.runs)
        save(draw(runs, options.title), options.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Wrote {options.out}: {_describe(runs)}, {len(runs[0].layers)} blocks, up to step {common_end(runs):.0f}")
    return 0


def check_output(out: Path) -> None:
    """Refuse, before any work, a picture that could not be written; raises UserError."""
    if out.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UserError(f"--out {out}: the name must end in .png, .svg or .pdf")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.parent} does not exist")
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder")


def read_runs(folders: Sequence[Path]) -> list[PathHistory]:
    """Read the runs; raises UserError for one given twice, or of another model than the first."""
    twice = [folder for i, folder in enumerate(folders) if folder.resolve() in [f.resolve() for f in folders[:i]]]
    if twice:
        raise UserError(f"{twice[0]} is given twice: a standard deviation needs different runs")
    runs = [read_paths(folder) for folder in folders]
    for run in runs[1:]:
        if (run.layers, run.stages) != (runs[0].layers, runs[0].stages):
            raise UserError(
                f"{runs[0].run} has {len(runs[0].layers)} blocks ({runs[0].layers[0]}, ...) and {run.run} has "
                f"{len(run.layers)} ({run.layers[0]}, ...): draw each model in a picture of its own"
            )
    late = max(runs, key=lambda run: float(run.steps[0]))
    if late.steps[0] > common_end(runs):
        raise UserError(f"{late.run} starts at step {late.steps[0]:.0f}, after another run's last: they share no step")
    return runs


def common_end(runs: Sequence[PathHistory]) -> float:
    """The last step that every run has reached."""
    return min(float(run.steps[-1]) for run in runs)


def draw(runs: Sequence[PathHistory], title: str | None = None) -> Figure:
    """Draw four panels: weights and their log ratio (columns), against depth and over training (rows)."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 6.6), layout="constrained")
        axes = figure.subplots(2, 2)
        figure.suptitle(title or _headline(runs), x=0.01, ha="left", fontsize=12, fontweight="bold")
        draw_depth(axes[0, 0], axes[0, 1], runs)
        draw_course(axes[1, 0], axes[1, 1], runs)
        _add_legend(figure, axes[0, 0], axes[1, 1])
    return figure


def draw_depth(weights: Axes, ratio: Axes, runs: Sequence[PathHistory]) -> None:
    """Alpha and beta, and their log ratio, of every block at the last step that all runs reached."""
    end = common_end(runs)
    depth = np.arange(1.0, len(runs[0].layers) + 1)
    for name, colour, marker in (("alpha", BLUE, "o"), ("beta", VERMILLION, "s")):
        values = np.stack([_at(run.steps, getattr(run, name), end) for run in runs])  # (R, D)
        _mean_band(weights, depth, values, colour, label=NAMES[name], marker=marker, linestyle=LINES[name])
    values = np.stack([_at(run.steps, run.log_ratio, end) for run in runs])
    _mean_band(ratio, depth, values, INK, marker="D")
    weights.set_ylabel("weight")
    _mark_ratio(ratio, values)
    for axis, title in ((weights, "Path weights"), (ratio, "Balance of the paths")):
        axis.set_title(f"{title} by depth, at step {end:,.0f}", pad=20)
        _widen(axis, 0.1)
        _mark_stages(axis, runs[0].stages)


def draw_course(weights: Axes, ratio: Axes, runs: Sequence[PathHistory]) -> None:
    """The stage means of alpha and beta, and of their log ratio, over the updates of training."""
    stages = sorted(set(runs[0].stages))
    shown = []
    for i, stage in enumerate(stages):
        blocks = np.array(runs[0].stages) == stage
        colour = STAGES[i % len(STAGES)]
        for name in ("alpha", "beta"):
            curves = [getattr(run, name)[:, blocks].mean(1) for run in runs]
            _mean_course(weights, runs, curves, colour, linestyle=LINES[name])
        curves = [run.log_ratio[:, blocks].mean(1) for run in runs]
        shown.extend(curves)
        _mean_course(ratio, runs, curves, colour, label=f"stage {stage}")
    weights.set_ylabel("weight")
    _mark_ratio(ratio, np.concatenate(shown))
    for axis, title in ((weights, "Path weights"), (ratio, "Balance of the paths")):
        axis.set_title(f"{title} over training, stage means", pad=8)
        axis.set_xlabel("step (updates)")
        last = max(float(run.steps[-1]) for run in runs)
        axis.set_xlim(-0.02 * max(last, 1), 1.02 * max(last, 1))
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        _widen(axis, 0.1)
        _mark_shortest(axis, runs)


def save(figure: Figure, out: Path) -> None:
    """Write the picture whole or not at all; raises UserError when it cannot be written."""
    temporary = out.with_name(f".{out.stem}.{os.getpid()}{out.suffix}")
    metadata = {"Date": None} if out.suffix.lower() == ".svg" else None
    try:
        with matplotlib.rc_context(STYLE):
            figure.savefig(temporary, dpi=160, metadata=metadata)
        os.replace(temporary, out)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _mean_band(axis: Axes, x: Array, values: Array, colour: str, **line: Any) -> None:
    """The mean over runs (R, D), with ± one standard deviation as a band where there are several."""
    values = np.where(np.isfinite(values), values, np.nan)
    mean = values.mean(0)
    axis.plot(x, mean, color=colour, linewidth=1.8, markersize=5, **line)
    if len(values) > 1:
        spread = values.std(0, ddof=1)
        axis.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)


def _mean_course(axis: Axes, runs: Sequence[PathHistory], curves: Sequence[Array], colour: str, **line: Any) -> None:
    """The mean over runs as far as all of them go, then each longer run alone, as a thin line."""
    end = common_end(runs)
    start = max(float(run.steps[0]) for run in runs)
    grid = np.unique(np.concatenate([run.steps for run in runs]))
    grid = grid[(grid >= start) & (grid <= end)]
    common = np.stack([_at(run.steps, curve[:, None], grid)[:, 0] for run, curve in zip(runs, curves, strict=True)])
    marker = "o" if len(grid) == 1 else ""
    _mean_band(axis, grid, common, colour, marker=marker, **line)
    for run, curve in zip(runs, curves, strict=True):
        alone = np.append(end, run.steps[run.steps > end])
        if len(alone) > 1:
            rest = _at(run.steps, curve[:, None], alone)[:, 0]
            axis.plot(alone, rest, color=colour, linewidth=0.7, alpha=0.7, linestyle=line.get("linestyle", "-"))


def _at(steps: Array, values: Array, at: Array | float) -> Array:
    """Values (T, D) at other steps, linearly between those logged: (D,) for one step, (len(at), D) for many."""
    columns = [np.interp(at, steps, column) for column in values.T]
    return np.stack(columns, axis=-1)


def _mark_ratio(axis: Axes, values: Array) -> None:
    """Name the axis and its sides, and mark where the paths weigh the same."""
    axis.axhline(0, color=INK, linewidth=0.8, linestyle=":")
    axis.set_ylabel("log |α / β|\n← convolution      attention →")
    if not np.isfinite(values).any():
        message = "not defined: one of the paths has weight 0"
        axis.text(0.5, 0.6, message, transform=axis.transAxes, ha="center", color=INK)


def _widen(axis: Axes, span: float) -> None:
    """Show at least `span` of the y axis: differences in the third digit should not fill the panel."""
    low, high = axis.get_ylim()
    missing = max(0.0, span - (high - low)) / 2
    axis.set_ylim(low - missing, high + missing)


def _mark_stages(axis: Axes, stages: Sequence[int]) -> None:
    """Shade every other stage and name each above its blocks."""
    borders = [i for i in range(1, len(stages)) if stages[i] != stages[i - 1]]
    edges = [0, *borders, len(stages)]
    narrow = min(last - first for first, last in pairwise(edges)) / len(stages) < 0.1
    for i, (first, last) in enumerate(pairwise(edges)):
        if i % 2 == 0:
            axis.axvspan(first + 0.5, last + 0.5, color="#000000", alpha=0.06, linewidth=0, zorder=0)
        label = str(stages[first]) if narrow and last - first < len(stages) / 2 else f"stage {stages[first]}"
        place = ((first + last + 1) / 2, 1.02)
        axis.text(*place, label, transform=axis.get_xaxis_transform(), ha="center", fontsize=8, color=GREY)
    axis.set_xlim(0.5, len(stages) + 0.5)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True, min_n_ticks=1))
    axis.set_xlabel("depth (block)")


def _mark_shortest(axis: Axes, runs: Sequence[PathHistory]) -> None:
    """Where runs have unequal lengths, say where the mean ends and single runs go on."""
    end = common_end(runs)
    if any(run.steps[-1] > end for run in runs):
        axis.axvline(end, color=GREY, linewidth=0.8, linestyle=":")
        text = "shortest run ends "
        axis.text(end, 0.01, text, transform=axis.get_xaxis_transform(), ha="right", fontsize=8, color=GREY)


def _add_legend(figure: Figure, paths: Axes, stages: Axes) -> None:
    """One legend for the whole picture, below it: the curves keep their panels to themselves."""
    lines = [*paths.get_legend_handles_labels()[0], *stages.get_legend_handles_labels()[0]]
    figure.legend(handles=lines, loc="outside lower center", ncols=min(8, len(lines)), handlelength=3)


def _describe(runs: Sequence[PathHistory]) -> str:
    return "1 run" if len(runs) == 1 else f"mean ± standard deviation of {len(runs)} runs"


def _headline(runs: Sequence[PathHistory]) -> str:
    model = runs[0].model or "ACmix"
    return f"{model}: what attention and convolution weigh ({_describe(runs)})"


if __name__ == "__main__":
    sys.exit(main())
