"""The results of a study as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from acmix.studies.statistics import LEAST

_BUDGETS = {
    "epochs": "each arm as configured",
    "time": "training time (epochs scaled by measured images/s)",
    "multiply_adds": "multiply-adds in training (epochs scaled)",
    "parameters": "parameters",
}

COMPARED = (
    "top-1 of the last epoch, mean ± standard deviation over the seeds. The difference is over pairs of one seed, "
    "in points; its interval and p are of a paired t-test, not corrected for the number of arms."
)
"""What the table of arms compares."""


def markdown(results: Mapping[str, Any], command: str) -> str:
    """The text of `results.md`: what was run, the table of arms, and the path weights by stage where there are any."""
    reference, arms = results["reference"], results["arms"]
    lines = [
        f"# {results['study']}",
        "",
        f"{results['model']} on {results['dataset']}, equal {results['equal']}: {_BUDGETS[results['equal']]}.",
        f"Seeds {', '.join(map(str, results['seeds']))}. Made by `{command}`.",
        "",
        *_table(comparison(results)),
        "",
        COMPARED,
    ]
    if any(arm["pairs"] < LEAST for arm in arms if arm["name"] != reference):
        lines.append(f"n < {LEAST}: too few seeds for an interval.")
    if any(arm["paths"] for arm in arms):
        lines += [
            "",
            "Path weights after training, stage means (α attention, β convolution):",
            "",
            *_table(_paths(arms)),
        ]
    return "\n".join(lines) + "\n"


def comparison(results: Mapping[str, Any]) -> list[list[str]]:
    """The table of arms: a row of heads, then a row for each arm."""
    reference = results["reference"]
    return [
        ["arm", "top-1, %", "n", "best epoch, %", f"difference to {reference}", "95 % interval", "p", "epochs",
         "parameters", "multiply-adds", "images/s"],
        *([*_scores(arm, reference), *_costs(arm)] for arm in results["arms"]),
    ]  # fmt: skip


def _scores(arm: Mapping[str, Any], reference: str) -> list[str]:
    best = "" if not arm["best"] else f"{sum(arm['best']) / len(arm['best']):.2f}"
    scores = [arm["name"], spread(arm["mean"], arm["std"], 2), str(arm["n"]), best]
    if arm["name"] == reference:
        return [*scores, "reference", "", ""]
    difference = "" if arm["difference"] is None else f"{arm['difference']:+.2f}"
    if arm["interval"] is None:
        why = f"n < {LEAST}" if arm["pairs"] < LEAST else "all equal"
        return [*scores, difference, why, ""]
    low, high = arm["interval"]
    return [*scores, difference, f"{low:+.2f} to {high:+.2f}", f"{arm['p']:.2g}"]


def _costs(arm: Mapping[str, Any]) -> list[str]:
    rate = arm["images_per_second"]
    return [
        "" if arm["epochs"] is None else str(arm["epochs"]),
        f"{arm['parameters'] / 1e6:.3g} M",
        f"{arm['multiply_adds'] / 1e6:.3g} M",
        "" if rate is None else f"{rate:.0f}",
    ]


def _paths(arms: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    stages = sorted({row["stage"] for arm in arms for row in arm["paths"]})
    rows = [["arm", *(f"{name} stage {stage}" for stage in stages for name in "αβ")]]
    for arm in arms:
        found = {row["stage"]: row for row in arm["paths"]}
        cells = [
            spread(found[stage][key], found[stage][f"{key}_std"], 3) if stage in found else ""
            for stage in stages
            for key in ("alpha", "beta")
        ]
        if any(cells):
            rows.append([arm["name"], *cells])
    return rows


def spread(mean: float | None, std: float | None, digits: int) -> str:
    """`mean ± std`, the mean alone where there is no spread, nothing without a mean."""
    if mean is None:
        return ""
    return f"{mean:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table whose columns line up as plain text, too; a | in a cell, as of an arm's name, is escaped."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |" for row in rows]
    lines.insert(1, f"|{'|'.join('-' * (width + 2) for width in widths)}|")
    return lines
