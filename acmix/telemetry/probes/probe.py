"""What a probe is, and which probes there are."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, Literal

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
    every: steps from one measurement to the next; None: with each logged training row;
    needs: what `measure` takes besides the network. `images`: the same few validation images each time, (B, C, H, W),
    normalised and on the network's device; such a probe measures every `paths.every` steps unless it says otherwise.
    `gradients`: name in `named_parameters()` → gradient, of the path weights in the last update; before it none;
    shown: the keys whose stage means the terminal shows; None: all.

    All probes also measure at the start of a run and at the end of each epoch, those with images at its end only. Only
    rank 0 measures, without gradients. A probe with images leaves modes and statistics of the network as they
    are: `acmix.analysis.blocks.measuring` sees to it.
    """

    name: str
    measure: Callable[..., Sequence[Mapping[str, Any]]]
    every: int | None = field(default=None, kw_only=True)
    needs: Literal["images", "gradients"] | None = field(default=None, kw_only=True)
    shown: tuple[str, ...] | None = field(default=None, kw_only=True)

    def is_due(self, step: int, *, logged: bool, end: int | None = None) -> bool:
        """Whether to measure after update `step`; `logged` tells whether it has a training row.

        `end` is given at the start of a run and at the end of each epoch: the last step of the run.
        """
        if end is not None and (self.needs != "images" or step in (0, end)):
            return True
        return logged if self.every is None else step % self.every == 0

    def rows(self, model: nn.Module, given: Callable[[str], Any] | None = None) -> list[dict[str, Any]]:
        """Measure the model; `given` makes what the probe `needs`. Raises ValueError for a row without its place."""
        with torch.no_grad():
            rest = () if self.needs is None or given is None else (given(self.needs),)
            rows = [dict(row) for row in self.measure(model, *rest)]
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


def find_probes(names: Sequence[str], images_every: int | None = None) -> list[Probe]:
    """The probes of these names, the value of `run.probes`; those with images are due every `images_every` steps.

    Raises UserError naming the nearest and all names.
    """
    for name in names:
        if name not in _PROBES:
            nearest = get_close_matches(name, _PROBES, n=1, cutoff=0.0)[0]
            raise UserError(f"run.probes: unknown probe {name!r}; nearest: {nearest} (all: {', '.join(_PROBES)})")
    probes = [_PROBES[name] for name in dict.fromkeys(names)]
    return [
        replace(probe, every=images_every) if probe.needs == "images" and probe.every is None else probe
        for probe in probes
    ]
