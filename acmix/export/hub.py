"""A trained network as a folder for timm and the Hugging Face hub: weights, configuration and a model card."""

import inspect
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.models import save_for_hf
from torch import nn

from acmix.checkpoint.atomic import remove_folder
from acmix.checkpoint.manifest import MODEL_FILE
from acmix.checkpoint.read import resolve_weights
from acmix.checkpoint.weights import Kind, pick_weights
from acmix.config import Config
from acmix.config.yaml import write_yaml
from acmix.data.datasets import statistics_of
from acmix.data.transforms import kept_share
from acmix.engine.run_folder import METRICS, SUMMARY, read_summary, trained_classes
from acmix.errors import UserError
from acmix.export.load import build_network
from acmix.telemetry.probes.paths import path_layers
from acmix.telemetry.record import read_rows

RECIPE = ("augment", "loss", "optimizer", "schedule", "precision", "ema")
"""Sections of a config that say how a network was trained, and nothing of the machine."""

_OF_TIMM = ("pretrained_cfg", "num_classes", "num_features")


class Trained(NamedTuple):
    """A network in evaluation mode, its config, its classes, and the record of the run that trained it."""

    network: nn.Module
    config: Config
    classes: list[str] | None
    averaged: bool | None
    """Whether these are the running average of the weights (EMA); None where there is none."""
    progress: dict[str, Any]
    """What the checkpoint says of itself; empty for a bare file of weights."""
    run: Path
    """The run folder, or whatever folder the config lies in."""


def load_trained(path: Path, config: Config, run: Path, kind: Kind) -> Trained:
    """The network behind a run, a checkpoint or a file of weights. Raises UserError where it cannot be had."""
    found = resolve_weights(path)
    weights, classes = pick_weights(path, kind)
    classes = classes or trained_classes(path)
    width = config.model.num_classes or len(classes or ())
    if not width:
        raise UserError(f"{path}: does not say how many classes it is for; give model.num_classes=N")
    network = build_network(config, width, weights, path).eval()
    averaged = None if found.ema is None else kind != "raw"
    return Trained(network, config, classes, averaged, found.progress or {}, run)


def write_folder(trained: Trained, out: Path, *, force: bool = False) -> None:
    """Write `model.safetensors`, `config.json` and `README.md`; timm.create_model("local-dir:OUT") has been tried.

    Raises UserError for a folder that holds something, unless it may be replaced (`force`).
    """
    refuse_full(out, force=force)
    _refuse_foreign(trained)
    with _replacing_folder(out) as folder:
        details = {"label_names": trained.classes, "pretrained_cfg": _preprocessing(trained)}
        save_for_hf(trained.network, str(folder), details, model_args=_arguments(trained), safe_serialization=True)
        (folder / MODEL_FILE).chmod(0o644)  # safetensors lets nobody else read it
        (folder / "README.md").write_text(model_card(trained), encoding="utf-8")
        again = timm.create_model(f"local-dir:{folder}", pretrained=True).state_dict()
        for name, value in trained.network.state_dict().items():
            if not torch.equal(again[name], value):
                raise RuntimeError(f"{out}: timm gives another {name} than was written")


def refuse_full(out: Path, *, force: bool) -> None:
    """Raise UserError for a place that holds something already, unless it may be replaced."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is no folder; choose another name")
    if not force and out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {out}: holds something already; choose another folder, or replace it with --force")


def refuse_own(out: Path, *read: Path) -> None:
    """Raise UserError for a folder that holds what is to be read: replacing it would destroy the run."""
    for path in read:
        if path.resolve().is_relative_to(out.resolve()):
            raise UserError(f"--out {out}: holds {path}, which is to be exported; choose another folder")


def _refuse_foreign(trained: Trained) -> None:
    """Raise UserError for a network without what timm writes of every network."""
    missing = [name for name in _OF_TIMM if not hasattr(trained.network, name)]
    if missing:
        raise UserError(
            f"{trained.config.model.name}: {type(trained.network).__name__} has no {' and no '.join(missing)}, which "
            "timm writes of every network; set them in its __init__"
        )


@contextmanager
def _replacing_folder(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that takes its place in the end, and leaves nothing where that fails."""
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".tmp-{out.name}-", dir=out.parent))
    try:
        yield folder
        folder.chmod(0o755)
        if out.is_dir():
            remove_folder(out)
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _arguments(trained: Trained) -> dict[str, Any]:
    """What timm has to give the constructor for this network."""
    arguments = {key: value for key, value in trained.config.model.kwargs.items() if key != "pretrained"}
    network = type(trained.network)
    if "img_size" in inspect.signature(network).parameters and not network.__module__.startswith("timm."):
        arguments.setdefault("img_size", list(trained.config.data.size))
    return arguments


def _preprocessing(trained: Trained) -> dict[str, Any]:
    """How validation prepared the images, in timm's words."""
    config, channels = trained.config, trained.config.model.in_chans
    statistics = statistics_of(config.data, channels)
    return {
        "tag": config.run.name,
        "input_size": [channels, *config.data.size],
        "mean": list(statistics.mean),
        "std": list(statistics.std),
        "interpolation": config.data.interpolation,
        "crop_pct": kept_share(config),
        "crop_mode": "center",
    }


def model_card(trained: Trained) -> str:
    """The card of a network in Markdown: data, recipe, figures, path weights; only what the run has recorded."""
    config = trained.config
    name = config.model.name
    count = sum(parameter.numel() for parameter in trained.network.parameters())
    arguments = ", ".join(f"{key}={value!r}" for key, value in _arguments(trained).items())
    sections = [
        f"# {name}",
        f"{count:,} parameters" + (f"; built with {arguments}." if arguments else "."),
        "## Use",
        "Install the package `acmix`; importing its models makes them known to timm.",
        "```python\nimport timm\nimport acmix.models\n\n"
        'network = timm.create_model("local-dir:FOLDER", pretrained=True)  # or hf-hub:USER/NAME\n```',
        "## Data",
        _data(trained),
        "## Recipe",
        _batches(trained),
        "```yaml\n" + write_yaml({key: config.model_dump(mode="json")[key] for key in RECIPE}) + "```",
        "## Figures",
        _figures(trained),
    ]
    if rows := path_layers(trained.network):
        lines = [f"| {r['layer']} | {r['stage']} | {r['alpha']:.4f} | {r['beta']:.4f} |" for r in rows]
        table = ["| layer | stage | alpha (attention) | beta (convolution) |", "|---|---|---|---|", *lines]
        sections += ["## Path weights", "\n".join(table)]
    header = "---\nlibrary_name: timm\npipeline_tag: image-classification\ntags:\n- image-classification\n- timm\n---"
    return "\n\n".join([header, *sections]) + "\n"


def _data(trained: Trained) -> str:
    data, shape = trained.config.data, _preprocessing(trained)
    classes = "" if trained.classes is None else f", {len(trained.classes)} classes"
    channels, height, width = shape["input_size"]
    values = {key: ", ".join(f"{value:.4g}" for value in shape[key]) for key in ("mean", "std")}
    return (
        f"`{data.dataset}`, trained on the split `{data.train_split}`, evaluated on `{data.val_split}`{classes}. "
        f"Images of {height} × {width} pixels and {channels} channel{'s' * (channels > 1)}, mean {values['mean']}, "
        f"standard deviation {values['std']}; {data.interpolation} resizing, centre crop of {shape['crop_pct']:g}."
    )


def _batches(trained: Trained) -> str:
    config = trained.config
    batch = trained.progress.get("global_batch", config.data.batch_size)
    return f"Batches of {batch} images a pass, {config.optimizer.accumulate} a step; `{config.optimizer.name}`:"


def _figures(trained: Trained) -> str:
    """What the run measured of this checkpoint, and with what."""
    step = trained.progress.get("step")
    lines = []
    if trained.averaged is not None:
        lines.append("- The weights are " + ("their running average (EMA)" if trained.averaged else "the raw ones"))
    for row in trained.progress.get("history", ()):
        if row["step"] == step:
            shares = ", ".join(f"{key} {row[key]:.2f} %" for key in ("top1", "top5") if key in row)
            loss = float(row["loss"])  # "nan" in JSON
            lines.append(
                f"- {shares}, loss {loss:.4f} on {row['count']} images, after epoch {row['epoch']} (step {step})"
            )
    summary, rows = read_summary(trained.run), _rows(trained.run)
    if summary:
        lines.append(f"- Run: {summary.get('status')}, {summary.get('step')} steps, seed {trained.config.run.seed}")
    start = next((row for row in rows if row.get("event") == "start"), {})
    if start:
        versions = ", ".join(f"{key} {value}" for key, value in start.get("versions", {}).items())
        lines.append(f"- Trained on {start.get('processes')} × {start.get('device')} with {versions}")
    if seconds := [row["seconds"] for row in rows if row.get("event") == "end" and "seconds" in row]:
        begun = [row["resumed_from"] for row in rows if row.get("event") == "start" and row.get("resumed_from")]
        since = f", after it was resumed at step {begun[-1]}" if begun else ""  # earlier ends leave the record
        lines.append(f"- Seconds: {seconds[-1]:.0f}{since}")
    return "\n".join(lines) or f"None are recorded: the weights do not lie in a run with `{METRICS}` and `{SUMMARY}`."


def _rows(run: Path) -> list[dict[str, Any]]:
    try:
        return list(read_rows(run / METRICS))
    except OSError:
        return []


def describe(trained: Trained, out: Path) -> str:
    """One line of JSON on what was written."""
    count = sum(parameter.numel() for parameter in trained.network.parameters())
    return json.dumps({"out": str(out), "model": trained.config.model.name, "parameters": count})
