"""What a probe is, and which probes there are."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from acmix.errors import UserError

_OTHER_EVENTS = ("start", "train", "eval", "skip", "unread", "end")


@dataclass(frozen=True)
class Probe:
    """Something to measure of a model while it trains, layer by layer.

    name: the event of its rows in metrics.jsonl and the first part of its TensorBoard tags;
    measure: takes the bare network and returns its rows in depth order; an empty list logs nothing. A row is a dict
    with `layer` (dotted name), `stage` (from 1), perhaps `depth` (from 1), and any number of named numbers;
    every: steps from one measurement to the next; None: with each logged training row.

    All probes also measure at the start of a run and at the end of each epoch. Only rank 0 measures, without gradients.
    """

    name: str
    measure: Callable[[nn.Module], Sequence[Mapping[str, Any]]]
    every: int | None = field(default=None, kw_only=True)

    def is_due(self, step: int, *, logged: bool) -> bool:
        """Whether to measure after update `step`; `logged` tells whether it has a training row."""
        return logged if self.every is None else step % self.every == 0

    def rows(self, model: nn.Module) -> list[dict[str, Any]]:
        """Measure the model. Raises ValueError for a row without `layer` and `stage`."""
        with torch.no_grad():
            rows = [dict(row) for row in self.measure(model)]
        for row in rows:
            if not (isinstance(row.get("layer"), str) and isinstance(row.get("stage"), int)):
                raise ValueError(f"probe {self.name}: a row needs `layer`, a str, and `stage`, an int; got {row}")
        return rows


_PROBES: dict[str, Probe] = {}


def register_probe(probe: Probe) -> None:
    """Make a probe known to `run.probes`.

    Raises ValueError for a name that another probe or another event of the record has, and for `every` below 1.
    """
    if probe.name in _OTHER_EVENTS:
        raise ValueError(f"a probe cannot be named {probe.name}: metrics.jsonl has other rows of that name")
    if probe.name in _PROBES:
        raise ValueError(f"there is a probe named {probe.name} already")
    if probe.every is not None and probe.every < 1:
        raise ValueError(f"probe {probe.name}: every must be at least 1, got {probe.every}")
    _PROBES[probe.name] = probe


def find_probes(names: Sequence[str]) -> list[Probe]:
    """The probes of these names, the value of `run.probes`. Raises UserError naming the nearest and all names."""
    for name in names:
        if name not in _PROBES:
            nearest = get_close_matches(name, _PROBES, n=1, cutoff=0.0)[0]
            raise UserError(f"run.probes: unknown probe {name!r}; nearest: {nearest} (all: {', '.join(_PROBES)})")
    return [_PROBES[name] for name in dict.fromkeys(names)]
