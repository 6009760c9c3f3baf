"""The page benchmarks/RESULTS.md: a table of the targets for every machine that has measured some."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from acmix.checkpoint.atomic import write_atomically
from benchmarks.results import Row, read_results
from benchmarks.suite import Target

_PREFACE = """\
# Benchmarks

Made by `python scripts/benchmark.py --suite --authors CLONE --photos FOLDER --cifar FOLDER`, which writes this page and
the JSON beside it, a file for each processor and each GPU; do not edit. Every ratio is the median over the rounds of
one process in which both sides ran in turn, ± the distance between the quartiles; n counts the rounds. What is timed
has first passed a parity check against the reference in float64. A training step is forward, loss and backward. On a
CPU all is float32; networks run at 224², batch 4 in training and 8 in inference; parts of them at batch 4, forward and
backward. Images and maps are NCHW unless the row says channels_last. A multiply-add counts as two operations; the roof
is what a large matrix product and a copy reach on as many threads. Peak memory is that of live tensors; weights and
inputs are not counted. Rows of operations, blocks and networks leave the C library's allocator at its defaults; blocks
are timed against the authors' in a process of their own, because what earlier work leaves to the allocator spares their
copies much and ours little. Where freed memory is kept, as in `train.py` on a CPU, networks are up to 16 % faster.
"""
_KINDS = {"cpu": "CPU", "cuda": "GPU"}


def write_page(folder: Path, targets: Sequence[Target]) -> None:
    """Write RESULTS.md from all `results-*.json` in the folder. Raises UserError for one that cannot be read."""
    parts = [_PREFACE]
    for kind, name in _KINDS.items():
        paths = sorted(folder.glob(f"results-{kind}-*.json"))
        asked = [target for target in targets if target.device == kind]
        parts += [_section(read_results(path), asked) for path in paths] or [_not_measured(name, asked)]
    parts += [_tiles(path) for path in sorted(folder.glob("tiles-cuda-*.json"))]
    write_atomically(folder / "RESULTS.md", "\n".join(parts))


def _tiles(path: Path) -> str:
    """The table of a sweep by benchmarks/tune_triton.py, whose JSON file `path` is."""
    sweep = json.loads(path.read_text(encoding="utf-8"))
    machine = sweep["machine"]
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in ("torch", "triton"))
    lines = [
        f"## Tiles of the Triton kernels, {machine['device']}, {sweep['dtype']}, batch 128\n",
        f"`python -m benchmarks.tune_triton`, {versions}, {machine['date'][:10]}; medians of the launches in 15 ms.",
        "The floor is the time in which every map is read or written once. What was fastest is now the default.\n",
        _cells("map", "kernel", "floor, ms", "before, ms", "fastest, ms", "× floor", "its tile", "tried"),
        "|---" * 8 + "|",
    ]
    for row in sweep["rows"]:
        best = dict(row["best"])
        took, floor, before = best.pop("result"), row["floor_ms"], row["default"]["result"]
        times = (f"{floor:.3f}", f"{before:.3f}", f"{took:.3f}", f"{took / floor:.1f}")
        sizes = ", ".join(f"{name} {size}" for name, size in best.items())
        lines.append(_cells(f"{row['channels']}x{row['side']}", row["kernel"], *times, sizes, str(len(row["tried"]))))
    return "\n".join([*lines, ""])


def summary(row: Row) -> str:
    """A row in one line of text."""
    head = f"{row['what']}, {_threads(row['threads'])}"
    if "value" not in row:
        return f"{head}: {_without_value(row)}"
    return f"{head}: {_figure(row)} (n={row['n']}), target {row['target']}: {'met' if row['met'] else 'missed'}"


def _section(data: dict[str, Any], targets: Sequence[Target]) -> str:
    rows = {(row["key"], row["threads"]): row for row in data["rows"]}
    columns = sorted({count for target in targets for count in target.threads})
    lines = [f"## {data['machine']}\n"]
    if rows:
        newest = max(rows.values(), key=lambda row: row["date"])
        versions = ", ".join(f"{name} {number}" for name, number in newest["versions"].items())
        took = sum(row.get("took_seconds", 0.0) for row in rows.values()) / 60
        lines.append(f"{versions}." + (f" Measuring these rows took {took:.0f} minutes." if took >= 1 else ""))
    for name, roof in data["roofs"].items():
        lines.append(
            f"Roof, {name}: {roof['gflops_per_second']:,.0f} GFLOP/s, {roof['gigabytes_per_second']:,.1f} GB/s."
        )
    heads = [_threads(count) for count in columns] if len(columns) > 1 else ["measured"]
    lines += ["", _cells("what", "target", *heads, "revision, date"), "|---" * (3 + len(heads)) + "|"]
    lines += [_line(target, [rows.get((target.key, count)) for count in columns], columns) for target in targets]
    lines += _tried(
        [target for target in targets if any(_is_missed(target, rows.get((target.key, n))) for n in columns)]
    )
    results = [result for row in rows.values() for result in row.get("results", [])]
    return "\n".join([*lines, "", *_times(results)])


def _is_missed(target: Target, row: Row | None) -> bool:
    """By the target as it is now; it may have moved since. What was refused has no figure at all."""
    return row is not None and ("refused" in row or ("value" in row and not target.met(row["value"])))


def _tried(missed: Sequence[Target]) -> list[str]:
    """What was tried for the targets that were missed; what several have in common is said once."""
    subjects: dict[str, list[str]] = {}
    for target in missed:
        subjects.setdefault(target.tried, []).append(target.what.partition(",")[0])
    told = [f"- {', '.join(dict.fromkeys(names))}: {tried}" for tried, names in subjects.items() if tried]
    return ["", "Missed, and what was tried:", "", *told] if told else []


def _line(target: Target, rows: Sequence[Row | None], columns: Sequence[int]) -> str:
    """A line of the table: the figures of each number of threads, and when they were measured."""
    cells = []
    for row, count in zip(rows, columns, strict=True):
        if count not in target.threads:
            cells.append("")
        elif row is None or "value" not in row:
            cells.append("not measured here" if row is None else _without_value(row))
        else:
            figure = f"{_figure(row)}, n={row['n']}"
            figure = f"**{figure}, missed**" if _is_missed(target, row) else figure
            cells.append(figure + (f" ({row['note']})" if row["note"] else ""))
    occasions = [f"{_revision(row)}, {row['date'][:10]}" for row in rows if row is not None]
    return _cells(target.what, str(target), *cells, "; ".join(dict.fromkeys(occasions)))


def _without_value(row: Row) -> str:
    if "refused" in row:
        return f"**refused**: {row['refused']}"
    return f"not measured here: {row['not_measured']}"


def _figure(row: Row) -> str:
    return f"{row['value']:.2f}" + (f" ± {row['spread']:.2f}" if row["n"] > 1 else "")


def _revision(row: Row) -> str:
    """The first digits of the revision, and whether files differed from it."""
    if row["revision"] is None:
        return "no revision"
    commit, plus, changes = row["revision"].partition("+")
    return commit[:9] + plus + changes


def _times(results: Sequence[Row]) -> list[str]:
    """The times behind the ratios, folded away."""
    if not results:
        return []
    head = ("subject", "threads", "mode", "ms", "±", "images/s", "peak MiB", "GFLOP/s", "of roof")
    return [
        "<details><summary>Times</summary>\n",
        _cells(*head),
        "|---" * len(head) + "|",
        *dict.fromkeys(_time(result) for result in results),
        "\n</details>\n",
    ]


def _time(result: Row) -> str:
    how = [result["dtype"], *(word for word in ("compile", "channels_last") if result[word])]
    return _cells(
        f"{result['subject']} ({', '.join(how)}, batch {result['batch_size']})",
        str(result["threads"]),
        result["mode"],
        f"{1e3 * result['seconds_median']:.2f}",
        f"{1e3 * result['seconds_spread']:.2f}",
        f"{result['images_per_second']:,.1f}",
        f"{result['peak_bytes'] / 2**20:,.0f}" if result["peak_bytes"] else "",
        f"{result['gflops_per_second']:,.1f}",
        f"{result['roofline_share']:.0%}",
    )


def _not_measured(name: str, targets: Sequence[Target]) -> str:
    lines = [_cells(target.what, str(target), "not measured here") for target in targets]
    return "\n".join([f"## {name}\n", _cells("what", "target", "measured"), "|---|---|---|", *lines, ""])


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _cells(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
