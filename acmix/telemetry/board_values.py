"""What TensorBoard shows of each row of a run's record."""

from collections.abc import Iterator, Mapping
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard.summary import custom_scalars, hparams

from acmix.telemetry.layer_rows import LayerRows
from acmix.telemetry.record import Row, as_number
from acmix.telemetry.scalars import scalars

_HYPERPARAMETERS = ("model", "augment", "loss", "optimizer", "schedule", "precision", "ema")
_METRICS = ("top1", "top5", "loss")


class BoardValues:
    """Turns rows, one after the other, into TensorBoard's values.

    Scalars: `train/*`, `eval/*`; of each probe `NAME/KEY/STAGE/LAYER` and `NAME/KEY/STAGE/mean`. With the first path
    weights a chart for each stage (Custom Scalars) of alpha, beta and the effective share; with each evaluation the
    path weights by depth (Images); at the end the run's config with its last metrics (HParams).
    """

    def __init__(self) -> None:
        self._config: Mapping[str, Any] = {}
        self._probes: dict[str, Row] = {}

    def of(self, row: Row, *, picture: bool = True) -> list[Summary.Value]:
        """The values of a row; `picture` may leave out the picture, which takes the longest."""
        event = row["event"]
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(row)]
        if event == "paths" and event not in self._probes and row.get("layers"):
            values.extend(_charts(row["layers"]).value)
        if row.get("layers"):
            self._probes[event] = row
        if event == "start" and isinstance(row.get("config"), dict):
            self._config = row["config"]
        if event == "eval" and picture and "paths" in self._probes:
            values.append(_picture(self._probes["paths"], self._probes.get("path_shares")))
        if event == "end" and isinstance(row.get("last"), dict):
            values.extend(_hyperparameters(self._config, row["last"]))
        return values


def _charts(layers: LayerRows) -> Summary:
    """One chart for each stage: the means of alpha, of beta and of the effective share of attention."""
    keys = ("paths/alpha", "paths/beta", "path_shares/attention_share")
    stages = sorted({layer["stage"] for layer in layers})
    charts = {f"stage {stage}": ["Multiline", [f"^{key}/{stage}/mean$" for key in keys]] for stage in stages}
    summary: Summary = custom_scalars({"alpha, beta and the share of attention": charts})
    return summary


def _picture(paths: Row, shares: Row | None) -> Summary.Value:
    from acmix.telemetry.pictures import depth_picture  # matplotlib takes long to load, and not every run needs it

    return Summary.Value(tag="paths/depth", image=Summary.Image(encoded_image_string=depth_picture(paths, shares)))


def _hyperparameters(config: Mapping[str, Any], last: Mapping[str, Any]) -> Iterator[Summary.Value]:
    """What a run was made with and is compared by, without what is off, and its last evaluation."""
    chosen: dict[str, Any] = {}
    for section in _HYPERPARAMETERS:
        chosen |= dict(_flat(section, config.get(section, {})))
    if "run" in config:
        chosen["run.seed"] = config["run"].get("seed")
    metrics = {f"eval/{key}": number for key in _METRICS if (number := as_number(last.get(key))) is not None}
    for summary in hparams(chosen, metrics):
        yield from summary.value


def _flat(name: str, value: Any) -> Iterator[tuple[str, bool | int | float | str]]:
    """A value by its name, a mapping's values by theirs; lists as text; nothing for null, 0, false and empty values."""
    if isinstance(value, Mapping):
        for key, inside in value.items():
            yield from _flat(f"{name}.{key}", inside)
    elif value:
        yield name, value if isinstance(value, (bool, int, float, str)) else str(value)
