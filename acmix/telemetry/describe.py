"""What a network is made of: its stages with their maps and heads, and what each part weighs and costs."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from acmix.layers import ACmix, AttentionPath, Path, PathMix
from acmix.telemetry.flops import RunningCount

PARTS = ("projections", "attention", "convolution", "rest")


@dataclass(frozen=True)
class Stage:
    """One stage of a network.

    name: the module that ends it, `head` for what comes after the last stage, `network` for a model without stages.
    map: (channels, height, width) at its end, None where no map is known.
    heads: of its attention layers, each number once, ascending.
    parameters, multiply_adds: by part, in the order of `PARTS`: the projections of ACmix blocks (to q, k and v, and
        after the attention), their attention paths, their convolution paths, and everything else.
    """

    name: str
    map: tuple[int, int, int] | None
    heads: tuple[int, ...]
    parameters: Mapping[str, int]
    multiply_adds: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """As plain data, with the totals of both mappings."""
        size = None if self.map is None else list(self.map)
        sums = {key: {**getattr(self, key), "total": sum(getattr(self, key).values())} for key in _SUMMED}
        return {"name": self.name, "map": size, "heads": list(self.heads), **sums}


_SUMMED = ("parameters", "multiply_adds")


def describe(model: nn.Module, input_size: tuple[int, int, int] = (3, 224, 224)) -> list[Stage]:
    """The stages of a network in the order in which one image of shape `input_size` passes them.

    Any model will do. Stages end where timm's `feature_info` says; a model without it is one stage. What is not in an
    ACmix block is counted as rest. A parameter belongs to the stage that first calls the module that owns it, one of
    the network itself, such as a position embedding of timm's, to the first stage.
    """
    parameter = next(model.parameters())
    walk = _Walk(model)
    walk.run(model, torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype))
    return walk.stages(model)


def total(stages: list[Stage]) -> Stage:
    """All stages as one."""
    sums = {key: {part: sum(getattr(stage, key)[part] for stage in stages) for part in PARTS} for key in _SUMMED}
    return Stage("total", None, (), sums["parameters"], sums["multiply_adds"])


def as_table(stages: list[Stage]) -> str:
    """The stages and their total as two tables in plain text, parameters and then millions of multiply-adds."""
    return "\n\n".join(
        _table(title, [*stages, total(stages)], key, form)
        for title, key, form in (
            ("parameters", "parameters", lambda count: f"{count:,}"),
            ("multiply-adds (M)", "multiply_adds", lambda count: f"{count / 1e6:,.1f}"),
        )
    )


def _table(title: str, stages: list[Stage], key: str, form: Any) -> str:
    rows = [[title, "map", "heads", *PARTS, "total"]]
    for stage in stages:
        counts = [getattr(stage, key)[part] for part in PARTS]
        size = "" if stage.map is None else "×".join(map(str, stage.map))
        rows.append([stage.name, size, " ".join(map(str, stage.heads)), *map(form, [*counts, sum(counts)])])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) if index < 3 else cell.rjust(width) for index, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    )


class _Walk(RunningCount):
    """A forward pass with an eye on where it is: in which stage, in a block, in a path."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        infos = getattr(model, "feature_info", [])
        infos = infos.get_dicts() if hasattr(infos, "get_dicts") else infos
        modules = dict(model.named_modules())
        self._ends = [info for info in infos if info.get("module") in modules]
        self._index = {modules[info["module"]]: index for index, info in reversed(list(enumerate(self._ends)))}
        self._now = 0  # index of the stage
        self._part = "rest"
        self._place: dict[nn.Module, tuple[int, str]] = {}
        self._maps: dict[int, tuple[int, int, int] | None] = {}
        self._counts = [Counter[str]() for _ in range(len(self._ends) + 1)]
        self._stage_began = self._block_began = self._in_paths = 0

    def watch(self, module: nn.Module) -> list[Any]:
        return [
            module.register_forward_pre_hook(self._enter_any),
            *super().watch(module),
            module.register_forward_hook(self._leave_any),
        ]

    def said(self, path: Path, multiply_adds: int, shape: Sequence[int]) -> None:
        projected = path.projection_multiply_adds(shape) if isinstance(path, AttentionPath) else 0
        self._counts[self._now][_part_of(path)] += multiply_adds - projected
        self._in_paths += multiply_adds - projected

    def stages(self, model: nn.Module) -> list[Stage]:
        """What was seen."""
        self._end_stage()
        parameters = [Counter[str]() for _ in self._counts]
        for stage, part, count in self._parameters(model):
            parameters[stage][part] += count
        names = [*(info["module"] for info in self._ends), "head" if self._ends else "network"]
        heads = [set[int]() for _ in names]
        for module, (stage, _) in self._place.items():
            number = module.heads if isinstance(module, ACmix) else getattr(module, "num_heads", None)
            if isinstance(number, int):
                heads[stage].add(number)
        return [
            Stage(
                name,
                self._maps.get(index),
                tuple(sorted(heads[index])),
                *({part: counts[index][part] for part in PARTS} for counts in (parameters, self._counts)),
            )
            for index, name in enumerate(names)
        ]

    def _parameters(self, model: nn.Module) -> Iterator[tuple[int, str, int]]:
        """Stage, part and number of values of every parameter."""
        of_proj = {
            id(parameter)
            for path in model.modules()
            if isinstance(path, AttentionPath) and path.proj is not None
            for parameter in path.proj.parameters()
        }
        of_mix = {id(p) for mix in model.modules() if isinstance(mix, PathMix) for p in mix.parameters()}
        for name, parameter in model.named_parameters():
            owner = name.rpartition(".")[0]
            while owner and model.get_submodule(owner) not in self._place:
                owner = owner.rpartition(".")[0]
            stage, part = self._place[model.get_submodule(owner)]
            if id(parameter) in of_mix:
                part = "rest"
            elif id(parameter) in of_proj:
                part = "projections"
            yield stage, part, parameter.numel()

    def _enter_any(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, ACmix):
            self._part, self._block_began, self._in_paths = "projections", self.total, 0
        elif isinstance(module, Path):
            self._part = _part_of(module)
        self._place.setdefault(module, (self._now, self._part))

    def _leave_any(self, module: nn.Module, inputs: tuple[Any, ...], out: Any) -> None:
        if isinstance(module, ACmix):
            self._counts[self._now]["projections"] += self.total - self._block_began - self._in_paths
            self._part = "rest"
        elif isinstance(module, Path):
            self._part = "projections"
        if self._index.get(module, -1) >= self._now:
            self._now = self._index[module]
            self._maps[self._now] = _map(out, int(self._ends[self._now]["num_chs"]))
            self._end_stage()
            self._now += 1

    def _end_stage(self) -> None:
        counts = self._counts[self._now]
        counts["rest"] += self.total - self._stage_began - counts.total()
        self._stage_began = self.total


def _part_of(path: Path) -> str:
    return "attention" if isinstance(path, AttentionPath) else "convolution"


def _map(out: Any, channels: int) -> tuple[int, int, int] | None:
    """Size of the map at the end of a stage, whatever the order of its sides; a row of tokens is a map of one row."""
    tensor = out if isinstance(out, Tensor) else next((part for part in out if isinstance(part, Tensor)), None)
    sides = [] if tensor is None else list(tensor.shape[1:])
    if channels not in sides or len(sides) not in (2, 3):
        return None
    sides.remove(channels)
    return channels, sides[0] if len(sides) == 2 else 1, sides[-1]
