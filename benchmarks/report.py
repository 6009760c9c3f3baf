"""Results, and what they were measured on, as a table on a terminal, as JSON, and as the page benchmarks/RESULTS.md."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from acmix.checkpoint.atomic import write_atomically
from acmix.process.environment import describe_machine
from benchmarks.measure import Result
from benchmarks.targets import TARGETS

_PREFACE = """\
# Benchmarks

Made by `python scripts/benchmark.py --suite --authors CLONE --photos FOLDER`, which writes this page and the JSON
beside it; do not edit. Every ratio is the median over the rounds of one process in which both sides ran in turn, ± the
distance between the quartiles; n counts the rounds. What is timed has first passed a parity check against the reference
in float64. A training step is forward, loss and backward. Peak memory is that of live tensors; weights and inputs are
not counted.
"""
_DEVICES = {"cpu": "CPU", "cuda": "GPU"}


def table(results: Sequence[Result], against: int | None = None) -> str:
    """Results in columns; with `against`, the index of the one that times are divided by."""
    head = ["subject", "impl", "mode", "median ms", "spread", "n", "images/s", "peak MiB", "MMAC", "roofline"]
    rows = [[*head, *(["time ratio"] if against is not None else [])]]
    for result in results:
        row = [result.case.label, result.case.impl, result.mode]
        if result.seconds is None:
            rows.append([*row, result.refused])
            continue
        times = [f"{1e3 * result.seconds.median:.3f}", f"{1e3 * result.seconds.spread:.3f}", str(result.seconds.n)]
        row += [*times, f"{result.images_per_second:,.1f}", f"{result.peak / 2**20:,.1f}"]
        row += [f"{result.multiply_adds / 1e6:,.1f}", f"{result.roofline:.1%}"]
        rows.append(row + ([_ratio(result, results[against])] if against is not None else []))
    return columns(rows)


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Text in aligned columns, the first three to the left."""
    full = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(len(row[i]) for row in full) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _ratio(result: Result, base: Result) -> str:
    if result.seconds is None or base.seconds is None:
        return "-"
    return f"{result.seconds.over(base.seconds).median:.3f}"


def machine_row(device: torch.device) -> dict[str, Any]:
    """What figures were measured on, as JSON values: a figure without it is worth nothing."""
    machine = describe_machine(device)
    return {
        "device": machine.gpu or machine.processor,
        "cores": machine.cores,
        "threads": machine.threads,
        "load": machine.load,
        "versions": {name: number for name, number in machine.versions.items() if number is not None},
        "cuda": machine.cuda,
        "revision": machine.git,
        "date": machine.date,
    }


def write_json(data: dict[str, Any], path: Path) -> None:
    """Replace a file as a whole; raises UserError when it cannot be written."""
    write_atomically(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n", make_parents=True)


def write_page(folder: Path) -> None:
    """Write RESULTS.md from the `results-DEVICE.json` files in the folder; a device without one is "not measured"."""
    parts = [_PREFACE]
    for device, name in _DEVICES.items():
        path = folder / f"results-{device}.json"
        data = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        parts.append(f"## {name}\n")
        parts.append(_section(data) if data else _not_measured(device))
    write_atomically(folder / "RESULTS.md", "\n".join(parts))


def _section(data: dict[str, Any]) -> str:
    machine = data["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    busy = f"{machine['threads']} thread(s) of {machine['cores']} cores, load {machine['load']} before"
    lines = [
        f"{machine['device']}, {busy}; {versions}; revision {machine['revision']}; {machine['date']}.\n",
        "| what | measured | n | target | |",
        "|---|---|---|---|---|",
        *(_target_line(row) for row in data["targets"]),
        "",
        "| subject | mode | ms | ± | images/s | peak MiB | MMAC | of roofline |",
        "|---|---|---|---|---|---|---|---|",
        *dict.fromkeys(_result_line(result) for row in data["targets"] for result in row.get("results", [])),
        "",
    ]
    return "\n".join(lines)


def _target_line(row: dict[str, Any]) -> str:
    note = f" ({row['note']})" if row.get("note") else ""
    if "value" not in row:
        reason = row.get("not_measured") or row.get("refused")
        return f"| {row['what']} | not measured here: {reason} | | {row['target']} | |"
    verdict = "met" if row["met"] else "**missed**"
    measured = f"{row['value']:.2f} ± {row['spread']:.2f}" if row["n"] > 1 else f"{row['value']:.2f}"
    return f"| {row['what']}{note} | {measured} | {row['n']} | {row['target']} | {verdict} |"


def _result_line(result: dict[str, Any]) -> str:
    how = [result["dtype"], *(word for word in ("compile", "channels_last") if result[word])]
    cells = [
        f"{result['subject']} ({', '.join(how)}, batch {result['batch_size']})",
        result["mode"],
        f"{1e3 * result['seconds_median']:.2f}",
        f"{1e3 * result['seconds_spread']:.2f}",
        f"{result['images_per_second']:,.1f}",
        f"{result['peak_bytes'] / 2**20:,.0f}",
        f"{result['multiply_adds'] / 1e6:,.1f}",
        f"{result['roofline_share']:.0%}",
    ]
    return f"| {' | '.join(cells)} |"


def _not_measured(device: str) -> str:
    rows = [f"| {target.what} | not measured here |" for target in TARGETS if target.device == device]
    return "\n".join(["| what | measured |", "|---|---|", *rows, ""])
