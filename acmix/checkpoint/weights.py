"""Weights from a run, a checkpoint or a file into a network: ours, timm's or the authors'."""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from acmix.checkpoint.fit import fit_channels, fit_positions, load_fitting
from acmix.checkpoint.read import resolve_weights
from acmix.errors import UserError
from acmix.paths import missing_path_hint

Translate = Callable[[nn.Module, Mapping[str, Any]], None]
Kind = Literal["auto", "ema", "raw"]


class Picked(NamedTuple):
    """Weights (parameter name → tensor) and the classes they were trained on (None: the file does not say)."""

    weights: dict[str, Tensor]
    classes: list[str] | None


def pick_weights(path: str | Path, kind: Kind = "auto") -> Picked:
    """The weights behind a path; `auto` takes the running average where there is one.

    Raises UserError when the path holds no weights, is damaged or hostile, or holds no average and `ema` is asked for.
    """
    found = resolve_weights(Path(path))
    if kind == "ema" and found.ema is None:
        raise UserError(f"{path}: holds no averaged weights (ema); use --weights raw or auto")
    weights = found.model if found.ema is None or kind == "raw" else found.ema
    return Picked(weights, None if found.progress is None else found.progress.get("classes"))


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: str, translate: Translate) -> None:
    """Load weights strictly; those of the authors' release go through `translate` (models.load_official).

    Position tables for another size of image are interpolated by the model's family, and a line on stderr says so.
    Raises UserError with the first that are missing, unknown or of another shape.
    """
    try:
        if any(name.endswith(".rate1") for name in weights):
            translate(model, weights)
        else:
            load_fitting(model, fit_positions(model, weights, source))
    except (RuntimeError, ValueError, LookupError, AssertionError, AttributeError, TypeError) as error:
        way_out = _other_classes(model, weights)
        raise UserError(f"{source}: the weights do not fit {type(model).__name__}: {error}{way_out}") from None


def start_from(model: nn.Module, source: str, translate: Translate) -> None:
    """Initial weights (`model.checkpoint`): as load_weights, but a classifier for other classes is not loaded.

    A first convolution for another number of channels is adapted. Warnings on stderr then say so. Raises UserError as
    load_weights and pick_weights do.
    """
    try:
        weights = pick_weights(source).weights
    except UserError:
        if os.path.exists(source):
            raise
        expected = "give a run folder, a checkpoint or a weights file"
        raise UserError(f"model.checkpoint: {source} does not exist; {expected}{missing_path_hint(source)}") from None
    weights = fit_channels(model, weights, source)
    own = model.state_dict()
    head = _classifier_names(model, own)
    other = [name for name in head if name in weights and weights[name].shape != own[name].shape]
    if other:
        print(f"warning: {source}: its classifier is for other classes; this one starts new", file=sys.stderr)
        weights = {**weights, **{name: own[name] for name in head}}
    load_weights(model, weights, source, translate)


def _other_classes(model: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """For a message: the classes of either side where only their number differs; else empty."""
    own = model.state_dict()
    other = [name for name in own if name in weights and weights[name].shape != own[name].shape]
    if not other or not set(other) <= set(_classifier_names(model, own)):
        return ""
    theirs, ours = len(weights[other[0]]), len(own[other[0]])
    return (
        f"\nThe weights are for {theirs} classes, the data has {ours}; name all {theirs}, in order: data.classes=FILE"
    )


def _classifier_names(model: nn.Module, names: Mapping[str, Tensor]) -> list[str]:
    classifier = getattr(model, "get_classifier", lambda: None)()
    prefixes = [name for name, module in model.named_modules() if module is classifier and name]
    return [name for name in names if any(name.startswith(f"{prefix}.") for prefix in prefixes)]
