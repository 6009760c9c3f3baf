"""The results of a study as a picture: every seed as a dot, and each arm's difference to the reference."""

from collections.abc import Mapping
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from acmix.studies.statistics import LEAST
from acmix.telemetry.figure_file import drawn_text
from acmix.telemetry.plot import BLUE, GREY, INK, STYLE, VERMILLION


def draw(results: Mapping[str, Any]) -> Figure:
    """Left: top-1 of every seed as a dot, mean and standard deviation. Right: the paired difference to the reference.

    One row an arm, in the study's order, from the top.
    """
    arms = results["arms"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 1.6 + 0.45 * len(arms)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        title = f"{results['study']}: {results['model']} on {results['dataset']}, equal {results['equal']}"
        figure.suptitle(drawn_text(title), x=0.01, ha="left", fontsize=12, fontweight="bold")
        for row, arm in enumerate(arms):
            _draw_scores(left, row, arm)
            _draw_difference(right, row, arm, results["reference"])
        left.set_yticks(range(len(arms)), [drawn_text(f"{arm['name']} (n = {arm['n']})") for arm in arms])
        left.set_ylim(len(arms) - 0.5, -0.5)
        left.set_xlabel("top-1 of the last epoch, %")
        left.set_title("Every seed, mean ± standard deviation")
        right.axvline(0, color=GREY, linewidth=0.8, linestyle=":")
        right.set_xlabel("points of top-1, over pairs of one seed")
        right.set_title(drawn_text(f"Difference to {results['reference']}, 95 % interval"))
        for axis in (left, right):
            axis.grid(axis="y", color="#000000", alpha=0.08)
            axis.tick_params(axis="y", length=0)
    return figure


def _draw_scores(axis: Axes, row: int, arm: Mapping[str, Any]) -> None:
    scores, n = arm["top1"], arm["n"]
    if not n:
        axis.text(0.5, row, "no run finished", transform=axis.get_yaxis_transform(), ha="center", color=GREY)
        return
    offsets = [0.0] if n == 1 else [0.16 * (2 * i / (n - 1) - 1) for i in range(n)]  # equal scores stay apart
    axis.plot(scores, [row + offset for offset in offsets], "o", color=BLUE, markersize=5, alpha=0.7)
    axis.errorbar(arm["mean"], row, xerr=arm["std"], fmt="|", color=INK, markersize=16, capsize=3, linewidth=1.4)


def _draw_difference(axis: Axes, row: int, arm: Mapping[str, Any], reference: str) -> None:
    if arm["name"] == reference:
        axis.text(0, row, " reference", va="center", fontsize=8, color=GREY)
    elif arm["difference"] is not None:
        axis.plot(arm["difference"], row, "D", color=VERMILLION, markersize=5)
        if arm["interval"] is not None:
            axis.plot(arm["interval"], [row, row], color=VERMILLION, linewidth=1.8)
        else:
            why = f"no interval: n < {LEAST}" if arm["pairs"] < LEAST else "no interval: all equal"
            place = axis.get_yaxis_transform()
            text = axis.text(1.0, row, why, transform=place, ha="right", va="bottom", fontsize=8, color=GREY)
            text.set_bbox({"facecolor": axis.get_facecolor(), "edgecolor": "none", "pad": 0.5})  # over the line of zero
