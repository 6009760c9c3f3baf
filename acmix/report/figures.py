"""The pictures of a report, as SVG by matplotlib.

Not plotly: its script alone is larger than the 3 MB a page may have, while a panel here is some 20 kB, needs no script,
prints sharply, and looks as the pictures of `plot_paths.py` do, whose code it shares. Letters are drawn as paths, so no
font has to be there. A panel is as wide as a phone; the page puts as many side by side as fit.
"""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, StrMethodFormatter
from PIL import Image

from acmix.report.collect import Arm
from acmix.telemetry.figure_file import drawn_text
from acmix.telemetry.history import Array, ProbeHistory
from acmix.telemetry.plot import BLUE, GREY, INK, STYLE, VERMILLION, Column, draw_course, draw_depth

_SIZE = (4.7, 3.5)
_MOST_POINTS = 200
_LARGEST_IMAGE = 96
# Okabe and Ito's colours without yellow, which is too light for a line on white; a style for each turn of them.
_COLOURS = (BLUE, VERMILLION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
_CURVES = (
    ("eval", "top1", "Validation top-1", "percent"),
    ("eval", "loss", "Validation loss", "cross entropy"),
    ("train", "loss", "Training loss", "loss"),
    ("train", "lr", "Learning rate", "learning rate"),
)


@dataclass(frozen=True)
class Picture:
    """An image inside the page: its data as a URI, what it shows for those who cannot see it, and a caption."""

    uri: str
    alt: str
    caption: str = ""


def picture(figure: Figure, alt: str, caption: str = "", *, cut: bool = False) -> Picture:
    """A figure as SVG; with `cut`, without its empty margins."""
    data = BytesIO()
    with matplotlib.rc_context(STYLE | {"svg.fonttype": "path"}):
        figure.savefig(data, format="svg", metadata={"Date": None}, bbox_inches="tight" if cut else None)
    return Picture(_uri("image/svg+xml", data.getvalue()), alt, caption)


def photo(pixels: np.ndarray, alt: str, caption: str) -> Picture:
    """An image (H, W, 3) uint8 as JPEG, no larger than a thumbnail."""
    image = Image.fromarray(pixels)
    image.thumbnail((_LARGEST_IMAGE, _LARGEST_IMAGE))
    data = BytesIO()
    image.save(data, "JPEG", quality=90, subsampling=0)
    return Picture(_uri("image/jpeg", data.getvalue()), alt, caption)


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{b64encode(data).decode()}"


def curves(arms: Sequence[Arm]) -> list[Picture]:
    """Loss, accuracy and learning rate over the steps of training, all arms in each panel."""
    panels = []
    for event, key, title, label in _CURVES:
        series = {arm.name: _several(arm, event, key) for arm in arms}
        if any(series.values()):
            panels.append(picture(_draw_curves(series, title, label), f"{title} over the steps of training, by arm"))
    return panels


def _several(arm: Arm, event: str, key: str) -> list[tuple[Array, Array]]:
    """Steps and values of each run that has any."""
    found = [run.series(event, key) for run in arm.runs]
    return [_thinned(np.array(steps), np.array(values)) for steps, values in found if steps]


def _thinned(steps: Array, values: Array) -> tuple[Array, Array]:
    """Means of neighbours where there are more points than a panel can show."""
    if len(steps) <= _MOST_POINTS:
        return steps, values
    parts = [np.array_split(column, _MOST_POINTS) for column in (steps, values)]
    return np.array([part.mean() for part in parts[0]]), np.array([part.mean() for part in parts[1]])


def _draw_curves(series: Mapping[str, list[tuple[Array, Array]]], title: str, label: str) -> Figure:
    """One line an arm: the mean over its runs with the standard deviation as a band, then longer runs alone."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axis = figure.subplots()
        for i, (name, runs) in enumerate(series.items()):
            colour, dashes = _COLOURS[i % len(_COLOURS)], _DASHES[(i + i // len(_COLOURS)) % len(_DASHES)]
            if runs:
                _draw_mean(axis, runs, colour, dashes, _plain(name))
        axis.set(title=title, xlabel="step (updates)", ylabel=label)
        axis.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        _legend(figure, axis.get_legend_handles_labels()[0])
    return figure


def _draw_mean(axis: Axes, runs: Sequence[tuple[Array, Array]], colour: str, dashes: Any, name: str) -> None:
    first, last = max(steps[0] for steps, _ in runs), min(steps[-1] for steps, _ in runs)
    grid = np.unique(np.concatenate([steps for steps, _ in runs]))
    grid = grid[(grid >= first) & (grid <= last)]
    look = {"color": colour, "linestyle": dashes}
    if len(grid):
        values = np.stack([np.interp(grid, steps, column) for steps, column in runs])
        mean, marker = values.mean(0), "o" if len(grid) == 1 else ""
        axis.plot(grid, mean, linewidth=1.8, marker=marker, label=name, **look)
        if len(runs) > 1:
            spread = values.std(0, ddof=1)
            axis.fill_between(grid, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)
    for steps, column in runs:
        alone = steps >= last if len(grid) else steps >= 0
        if steps[-1] > last or not len(grid):
            axis.plot(steps[alone], column[alone], linewidth=0.8, alpha=0.7, **look)


def path_panels(
    column: Column, histories: Mapping[str, Sequence[ProbeHistory]], notes: Mapping[str, str]
) -> dict[str, list[Picture]]:
    """A quantity of the paths by depth, and over training where it was logged more than once: heading → panel an arm.

    histories: arm → its runs; notes: arm → what to add to its captions. The panels below a heading share their y axis.
    """
    panels = {}
    for what, by_depth in (("by depth", True), ("over training", False)):
        drawn = {
            name: _path_panel(by_depth, column, [_fewer_steps(run) for run in runs])
            for name, runs in histories.items()
            if by_depth or any(len(run.steps) > 1 for run in runs)
        }
        if drawn:
            lows, highs = zip(*(figure.axes[0].get_ylim() for figure in drawn.values()), strict=True)
            for figure in drawn.values():
                figure.axes[0].set_ylim(min(lows), max(highs))
            panels[f"{column.title} {what}"] = [
                picture(figure, f"{column.title} {what}, {name}", f"{name}{notes.get(name, '')}")
                for name, figure in drawn.items()
            ]
    return panels


def _path_panel(by_depth: bool, column: Column, runs: Sequence[ProbeHistory]) -> Figure:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axis = figure.subplots()
        if by_depth:
            draw_depth(axis, column, runs)
        else:
            draw_course(axis, column, runs)
        handles: list[Any] = []
        for line in axis.get_legend_handles_labels()[0]:
            if line.get_label() not in [handle.get_label() for handle in handles]:
                handles.append(line)
        if not by_depth:  # there the colour is the stage; the style says which curve
            named = [curve for curve in column.curves if curve.label]
            handles += [Line2D([], [], color=GREY, ls=curve.linestyle, label=curve.label) for curve in named]
        _legend(figure, handles)
    return figure


def _fewer_steps(run: ProbeHistory) -> ProbeHistory:
    """The run with as many steps as a panel can show, the first and the last among them."""
    if len(run.steps) <= _MOST_POINTS:
        return run
    kept = np.linspace(0, len(run.steps) - 1, _MOST_POINTS).round().astype(int)
    return replace(run, steps=run.steps[kept], values={key: column[kept] for key, column in run.values.items()})


def lesion_panel(places: Sequence[str], changes: Mapping[tuple[str, str], Array]) -> Figure:
    """What each lesion changes in top-1: a row for each place; (path, mode) → (runs, places), NaN without a lesion."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(_SIZE[0], 1.3 + 0.24 * max(len(places), 4)), layout="constrained")
        axis = figure.subplots()
        rows = np.arange(len(places))
        for (path, mode), values in changes.items():
            attention = path == "attention"
            offset = (-0.24 if attention else 0.08) + (0.0 if mode == "zero" else 0.16)
            spread = values.std(0, ddof=1) if len(values) > 1 else None
            axis.errorbar(
                values.mean(0), rows + offset, xerr=spread, fmt="o" if attention else "s", markersize=5, linewidth=1,
                color=BLUE if attention else VERMILLION, markerfacecolor=None if mode == "zero" else "white",
                label=f"{path} {'zeroed' if mode == 'zero' else 'by its mean'}",
            )  # fmt: skip
        axis.axvline(0, color=GREY, linewidth=0.8, linestyle=":")
        axis.set_yticks(rows, places)
        axis.set_ylim(len(places) - 0.5, -0.5)
        axis.grid(axis="y", color=INK, alpha=0.08)
        axis.set(title="What silencing a path costs", xlabel="change of top-1, points")
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6))
        _legend(figure, axis.get_legend_handles_labels()[0], columns=2)
    return figure


def _legend(figure: Figure, handles: Sequence[Any], columns: int = 3) -> None:
    """One legend below the panel."""
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(columns, len(handles)), handlelength=2.6)


def _plain(name: str) -> str:
    """A name of an arm for the legend: short, without a _ in front, which would hide it."""
    short = name if len(name) <= 24 else f"{name[:23]}…"
    drawn = drawn_text(short)
    return f" {drawn}" if drawn.startswith("_") else drawn
