"""Pictures of what a probe measured: by depth and over training, one run or mean ± standard deviation of several."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter
from numpy.typing import NDArray

from acmix.telemetry.history import Array, ProbeHistory, common_end, log_ratio

# Okabe and Ito's palette, readable with any colour vision; line style and marker repeat what the colour says.
BLUE, VERMILLION, INK, GREY = "#0072B2", "#D55E00", "#333333", "#777777"
STAGES = ("#000000", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442")
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


@dataclass(frozen=True)
class Curve:
    """A quantity to draw: how to get it from a run, (T, D), and its look."""

    values: Callable[[ProbeHistory], Array]
    colour: str = INK
    marker: str = "o"
    linestyle: str = "-"
    label: str | None = None


@dataclass(frozen=True)
class Column:
    """Two panels, by depth above and over training below, that show the same curves.

    span: the least range of the y axis, None for a tenth of its largest value; undefined: for a quantity around 0,
    whose line is then marked, what to say where no value is finite.
    """

    title: str
    ylabel: str
    curves: tuple[Curve, ...]
    span: float | None = None
    undefined: str | None = None


@dataclass(frozen=True)
class Layout:
    """What a picture shows: its headline after the model's name, what a row stands for, and its columns."""

    headline: str
    unit: str
    columns: tuple[Column, ...]


def _measured(key: str) -> Callable[[ProbeHistory], Array]:
    return lambda run: run.values[key]


_PATHS = Layout(
    "what attention and convolution weigh",
    "block",
    (
        Column(
            "Path weights",
            "weight",
            (
                Curve(_measured("alpha"), BLUE, "o", "-", "α, attention"),
                Curve(_measured("beta"), VERMILLION, "s", "--", "β, convolution"),
            ),
            span=0.1,
        ),
        Column(
            "Balance of the paths",
            "log |α / β|\n← convolution      attention →",
            (Curve(log_ratio, marker="D"),),
            span=0.1,
            undefined="not defined: one of the paths has weight 0",
        ),
    ),
)


WEIGHTS, BALANCE = _PATHS.columns
SHARE = Column("Effective share of attention", "share", (Curve(_measured("attention_share"), BLUE),), span=0.1)


_SHARES = Layout(
    "what attention and convolution add",
    "block",
    (
        SHARE,
        Column(
            "High frequencies",
            "share of the path's energy",
            (
                Curve(_measured("attention_high_share"), BLUE, "o", "-", "attention"),
                Curve(_measured("convolution_high_share"), VERMILLION, "s", "--", "convolution"),
            ),
            span=0.1,
        ),
        Column("Attention entropy", "bits", (Curve(_measured("entropy_bits")),)),
        Column("Attention distance", "pixels of the image", (Curve(_measured("distance_px")),)),
    ),
)
_OF_SHARES = ("attention_share", "attention_high_share", "convolution_high_share", "entropy_bits", "distance_px")


def layout(run: ProbeHistory) -> Layout:
    """The picture of a run's probe: weights and shares of the paths have their own, others a column for each key."""
    if run.probe == "paths":
        return _PATHS
    if run.probe == "path_shares" and run.values.keys() >= set(_OF_SHARES):
        return _SHARES
    columns = (Column(key, key, (Curve(_measured(key)),)) for key in run.values)
    return Layout(run.probe, "layer", tuple(columns))


def draw(runs: Sequence[ProbeHistory], title: str | None = None) -> Figure:
    """Draw the columns of the probe's layout, by depth (upper row) and over training (lower row)."""
    plan = layout(runs[0])
    count = len(plan.columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5 * max(count, 2), 6.6), layout="constrained")
        axes = figure.subplots(2, count, squeeze=False)
        headline = f"{runs[0].model or 'ACmix'}: {plan.headline} ({describe(runs)})"
        figure.suptitle(title or headline, x=0.01, ha="left", fontsize=12, fontweight="bold")
        for i, column in enumerate(plan.columns):
            draw_depth(axes[0, i], column, runs, plan.unit)
            draw_course(axes[1, i], column, runs)
        _add_legend(figure, [*axes[0], axes[1, -1]])
    return figure


def draw_depth(axis: Axes, column: Column, runs: Sequence[ProbeHistory], unit: str = "block") -> None:
    """The column's curves against depth, at the last step that all runs reached."""
    end = common_end(runs)
    depth = np.arange(1.0, len(runs[0].layers) + 1)
    shown = []
    for curve in column.curves:
        values = np.stack([_at(run.steps, curve.values(run), end) for run in runs])  # (R, D)
        shown.append(values)
        look = {"label": curve.label, "marker": curve.marker, "linestyle": curve.linestyle}
        _mean_band(axis, depth, values, curve.colour, **look)
    _name_values(axis, column, shown)
    axis.set_title(f"{column.title} by depth, at step {end:,.0f}", pad=20)
    _widen(axis, column.span)
    _mark_stages(axis, runs[0].stages, unit)


def draw_course(axis: Axes, column: Column, runs: Sequence[ProbeHistory]) -> None:
    """The stage means of the column's curves over the steps of training."""
    stages = sorted(set(runs[0].stages))
    shown = []
    for i, stage in enumerate(stages):
        for curve in column.curves:
            means = [_stage_mean(curve.values(run), np.array(run.stages) == stage) for run in runs]
            shown.extend(means)
            look = {"linestyle": curve.linestyle, "label": f"stage {stage}"}
            _mean_course(axis, runs, means, STAGES[i % len(STAGES)], **look)
    _name_values(axis, column, shown)
    axis.set_title(f"{column.title} over training, stage means", pad=8)
    axis.set_xlabel("step (updates)")
    last = max(float(run.steps[-1]) for run in runs)
    axis.set_xlim(-0.02 * max(last, 1), 1.02 * max(last, 1))
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    _widen(axis, column.span)
    _mark_shortest(axis, runs)


def describe(runs: Sequence[ProbeHistory]) -> str:
    """How many runs a picture shows."""
    return "1 run" if len(runs) == 1 else f"mean ± standard deviation of {len(runs)} runs"


def _mean_band(axis: Axes, x: Array, values: Array, colour: str, **line: Any) -> None:
    """The mean over runs (R, D), with ± one standard deviation as a band where there are several."""
    values = np.where(np.isfinite(values), values, np.nan)
    mean = values.mean(0)
    axis.plot(x, mean, color=colour, linewidth=1.8, markersize=5, **line)
    if len(values) > 1:
        spread = values.std(0, ddof=1)
        axis.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)


def _mean_course(axis: Axes, runs: Sequence[ProbeHistory], curves: Sequence[Array], colour: str, **line: Any) -> None:
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
            axis.plot(alone, rest, color=colour, linewidth=0.7, alpha=0.7, linestyle=line["linestyle"])


def _stage_mean(values: Array, stage: NDArray[np.bool_]) -> Array:
    """The mean, (T,), of values (T, D) over the layers of a stage, without layers that never have the quantity."""
    chosen = values[:, stage]
    measured = ~np.isnan(chosen).all(0)
    return chosen[:, measured].mean(1) if measured.any() else chosen[:, 0]


def _at(steps: Array, values: Array, at: Array | float) -> Array:
    """Values (T, D) at other steps, linearly between those logged: (D,) for one step, (len(at), D) for many."""
    columns = [np.interp(at, steps, column) for column in values.T]
    return np.stack(columns, axis=-1)


def _name_values(axis: Axes, column: Column, shown: Sequence[Array]) -> None:
    """Name the y axis; of a quantity around 0 mark the line of 0."""
    if column.undefined is not None:
        axis.axhline(0, color=INK, linewidth=0.8, linestyle=":")
        if not any(np.isfinite(values).any() for values in shown):
            axis.text(0.5, 0.6, column.undefined, transform=axis.transAxes, ha="center", color=INK)
    axis.set_ylabel(column.ylabel)


def _widen(axis: Axes, span: float | None) -> None:
    """Show at least `span` of the y axis: differences in the third digit should not fill the panel."""
    low, high = axis.get_ylim()
    least = 0.1 * max(abs(low), abs(high)) if span is None else span
    missing = max(0.0, least - (high - low)) / 2
    axis.set_ylim(low - missing, high + missing)


def _mark_stages(axis: Axes, stages: Sequence[int], unit: str) -> None:
    """Shade every other stage and name each above its rows."""
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
    axis.set_xlabel(f"depth ({unit})")


def _mark_shortest(axis: Axes, runs: Sequence[ProbeHistory]) -> None:
    """Where runs have unequal lengths, say where the mean ends and single runs go on."""
    end = common_end(runs)
    if any(run.steps[-1] > end for run in runs):
        axis.axvline(end, color=GREY, linewidth=0.8, linestyle=":")
        text = "shortest run ends "
        axis.text(end, 0.01, text, transform=axis.get_xaxis_transform(), ha="right", fontsize=8, color=GREY)


def _add_legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend for what the axes label, below the picture: the curves keep their panels to themselves."""
    lines = [line for axis in axes for line in axis.get_legend_handles_labels()[0]]
    figure.legend(handles=lines, loc="outside lower center", ncols=min(8, len(lines)), handlelength=3)
