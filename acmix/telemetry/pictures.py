"""The path weights and shares of a moment in training, by depth, as a picture in memory."""

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from acmix.telemetry.history import ProbeHistory
from acmix.telemetry.layer_rows import measured
from acmix.telemetry.plot import SHARE, STYLE, WEIGHTS, draw_depth

Row = Mapping[str, Any]


def depth_picture(paths: Row, shares: Row | None = None) -> bytes:
    """A PNG of alpha and beta by depth, and of the effective share beside them, from rows of the run's record."""
    panels = [(WEIGHTS, _moment(paths))]
    if shares is not None and "attention_share" in measured(shares["layers"]):
        panels.append((SHARE, _moment(shares)))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5 * len(panels), 3.2))
        figure.subplots_adjust(left=0.09, right=0.98, bottom=0.16, top=0.84, wspace=0.2)
        for axis, (column, moment) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
            draw_depth(axis, column, [moment])
            if len(column.curves) > 1:
                axis.legend()
        picture = BytesIO()
        figure.savefig(picture, format="png", dpi=80)
    return picture.getvalue()


def _moment(row: Row) -> ProbeHistory:
    """One row of a probe as a history of one step."""
    layers = row["layers"]
    return ProbeHistory(
        run=Path(),
        model="",
        probe=row["event"],
        layers=tuple(layer["layer"] for layer in layers),
        stages=tuple(int(layer["stage"]) for layer in layers),
        steps=np.array([row["step"]], dtype=np.float64),
        values={key: np.array([column], dtype=np.float64) for key, column in measured(layers).items()},
    )
