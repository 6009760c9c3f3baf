"""How the rows of a run read on a terminal or in a job's output."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from acmix.telemetry.layer_rows import LayerRows, measured, stage_means

Row = Mapping[str, Any]

_TRAIN: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("loss", lambda x: f"loss {x:.4f}"),
    ("lr", lambda x: f"lr {x:.3g}"),
    ("grad_norm", lambda x: f"grad {x:.3g}"),
    ("images_per_second", lambda x: f"{x:,.0f} images/s" if x >= 10 else f"{x:.2f} images/s"),
    ("data_wait", lambda x: f"waits for data {x:.0%}"),
    ("memory_gib", lambda x: f"{x:.2f} GiB"),
    ("eta_seconds", lambda x: f"ETA {timedelta(seconds=round(x))}"),
)


def start_lines(run_dir: Path, step: int, places: Sequence[str] = ()) -> list[str]:
    """Where the results go, loggers included, and from which update a resumed run continues."""
    resumed = [f"Continuing after update {step}"] if step else []
    return [f"Results go to {run_dir} ({', '.join(['metrics.jsonl', *places, 'checkpoints/'])})", *resumed]


def train_line(row: Row) -> str:
    """Progress of training in one line."""
    return "  ".join([_where(row), *(text(float(row[key])) for key, text in _TRAIN if row.get(key) is not None)])


def eval_line(row: Row) -> str:
    """An evaluation in one line."""
    accuracy = f"top-1 {row['top1']:.2f} %  top-5 {row['top5']:.2f} %"
    return f"{_where(row)}  evaluation: {accuracy}  loss {float(row['loss']):.4f}  ({row['count']:,} images)"


def probe_line(step: int, layers: LayerRows, shown: Collection[str] | None = None) -> str:
    """The stage means of what a probe measured, or of the keys `shown`, in one line; empty where there is no number."""
    columns = {key: column for key, column in measured(layers).items() if shown is None or key in shown}
    means = {key: stage_means(layers, column) for key, column in columns.items()}
    texts = (
        f"stage {stage} " + "/".join(f"{by_stage.get(stage, math.nan):.3f}" for by_stage in means.values())
        for stage in sorted({layer["stage"] for layer in layers})
    )
    return f"step {step}  {'/'.join(means)}: " + "  ".join(texts) if means else ""


def end_line(run_dir: Path, row: Row) -> str:
    """How the run ended, and where its results are."""
    status = row.get("status", "done")
    took = timedelta(seconds=round(row["seconds"]))
    return f"{str(status).capitalize()} at step {row['step']} after {took}. Results are in {run_dir}"


def _where(row: Row) -> str:
    epoch = f"epoch {row['epoch']}" + (f"/{row['epochs']}" if "epochs" in row else "")
    step = f"step {row['step']}" + (f"/{row['steps']}" if "steps" in row else "")
    return f"{epoch}  {step}"
