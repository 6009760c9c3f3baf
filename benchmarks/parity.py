"""Nothing is timed before it is shown to compute the same as the reference."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from acmix.layers.block import ACmix
from acmix.layers.path import Path
from acmix.testing import error_budget, relative_error
from benchmarks.cases import DTYPES, Case

Tensors = dict[str, Tensor]
_SUMMED = 2048  # values that one value of a map sums, over a window and the channels of a head
_WHOLE = 10  # times the budget of one path


class ParityError(Exception):
    """An implementation that does not compute what the reference computes; the message says where and by how much."""


def check_parity(case: Case) -> None:
    """Hold a case against its reference implementation in float64; raises ParityError.

    Every path, at every shape it meets in the case, must give the output and each gradient within the error budget of
    `acmix.testing`; so must every ACmix block, which may compute both of its paths at once, its gradients taken
    together. The module as a whole must give the reference's output (if it is compiled or a part of a network:
    its gradients too) within ten times that budget, because a network amplifies the rounding of every order of sums
    differently, while a mistake is of order one. A case in half precision is also checked in float32, where a slip at a
    border cannot hide in the noise; nor in that of TF32, which is off meanwhile.
    """
    with _without_tf32():
        _check(case)


@contextmanager
def _without_tf32() -> Iterator[None]:
    """cuDNN rounds the factors of float32 convolutions to TF32 unless told not to."""
    flags = torch.backends.cudnn
    with flags.flags(flags.enabled, flags.benchmark, flags.benchmark_limit, flags.deterministic, allow_tf32=False):
        yield


def _check(case: Case) -> None:
    seen = _with_statistics(case)
    for dtype in dict.fromkeys(["float32", case.setting.dtype]):
        for path in _parts(seen, dtype, Path):
            _check_path(path, dtype)
        for block in _parts(seen, dtype, ACmix):
            _check_block(block, dtype)
        _check_whole(case if case.setting.compile else seen, dtype)


def _with_statistics(case: Case) -> Case:
    """The case with a copy of its module, whose batch norms have the statistics of its images.

    Without any, the maps of a deep network grow to hundreds in inference. Attention is then all or nothing, and how
    much an implementation errs is the luck of a few roundings, for plain PyTorch as for others.
    """
    module = copy.deepcopy(case.module)
    update_bn([_inputs(case, "float32", 2)[0]], module)
    return replace(case, module=module)


def _parts(case: Case, dtype: str, kind: type[nn.Module]) -> Iterator[Case]:
    """Each part of a kind, as a case of its own, with the maps that reach it in the module; equal ones once."""
    found: dict[Any, Case] = {}
    setting = replace(case.setting, dtype=dtype, compile=False)

    def catch(part: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        maps = tuple(t.detach() for t in inputs[:3])
        impl = str(getattr(part, "impl", case.impl))
        key = (repr(part), impl, maps[0].shape, maps[0].stride())
        found.setdefault(key, Case(case.label, impl, part, maps, classifies=False, setting=setting))

    hooks = [m.register_forward_pre_hook(catch) for m in case.module.modules() if isinstance(m, kind)]
    try:
        _run(replace(case, setting=setting), _inputs(case, dtype, 2), gradients=False)
    finally:
        for hook in hooks:
            hook.remove()
    yield from found.values()


def _check_path(mine: Case, dtype: str) -> None:
    exact, plain = _references(mine)
    expected = _run(exact, tuple(t.double() for t in mine.inputs), gradients=True)
    errors = _errors(_run(mine, mine.inputs, gradients=True), expected)
    baseline = _errors(_run(plain, mine.inputs, gradients=True), expected)
    maps = ("output", *(f"gradient of input {i}" for i in range(3)))
    for key, error in errors.items():
        allowed = error_budget(baseline[key], DTYPES[dtype], _SUMMED if key in maps else mine.inputs[0].numel())
        _require(error <= allowed, mine, dtype, f"{key} of {type(mine.module).__name__}", error, allowed)


def _check_block(mine: Case, dtype: str) -> None:
    exact, plain = _references(mine)
    expected = _joined(_run(exact, tuple(t.double() for t in mine.inputs), gradients=True))
    errors = _errors(_joined(_run(mine, mine.inputs, gradients=True)), expected)
    baseline = _errors(_joined(_run(plain, mine.inputs, gradients=True)), expected)
    for key, error in errors.items():
        allowed = error_budget(baseline[key], DTYPES[dtype], _SUMMED)
        _require(error <= allowed, mine, dtype, f"{key} of ACmix", error, allowed)


def _check_whole(case: Case, dtype: str) -> None:
    compiled = case.setting.compile and dtype == case.setting.dtype
    mine = case if compiled else replace(case, setting=replace(case.setting, dtype=dtype, compile=False))
    inputs = _inputs(case, dtype, None if compiled else 2)  # another batch size would compile once more
    how = {"gradients": compiled or not case.classifies, "train": compiled}
    exact, plain = _references(mine)
    expected = _joined(_run(exact, tuple(t.double() for t in inputs), **how))
    errors = _errors(_joined(_run(mine, inputs, **how)), expected)
    baseline = _errors(_joined(_run(plain, inputs, **how)), expected)
    for key, error in errors.items():
        allowed = _WHOLE * error_budget(baseline[key], DTYPES[dtype], _SUMMED)
        _require(error <= allowed, mine, dtype, key, error, allowed)


def _require(passed: bool, case: Case, dtype: str, what: str, error: float, allowed: float) -> None:
    if not passed:
        raise ParityError(
            f"{case.label} [{case.impl}] differs from the reference in {dtype}: {what} is off by {error:.1e} relative, "
            f"{allowed:.1e} is allowed; it is not timed"
        )


def _references(case: Case) -> tuple[Case, Case]:
    """The case with the reference implementation of every path: in float64, and as it is."""
    module = copy.deepcopy(case.module)
    for part in module.modules():
        if isinstance(part, Path):
            part.impl = "reference"
    setting = replace(case.setting, compile=False)
    exact = replace(case, module=copy.deepcopy(module).double(), setting=replace(setting, dtype="float32"))
    return exact, replace(case, module=module, setting=setting)


def _inputs(case: Case, dtype: str, batch: int | None) -> tuple[Tensor, ...]:
    chosen = (t.detach()[:batch] for t in case.inputs)
    return tuple(t.to(DTYPES[dtype]) if not case.classifies else t for t in chosen)


def _run(case: Case, inputs: tuple[Tensor, ...], *, gradients: bool, train: bool = False) -> Tensors:
    """The output and, for a fixed random gradient of it, the gradients of inputs and parameters; without dropout."""
    modes = {part: part.training for part in case.module.modules()}
    case.module.train(train)
    for part in case.module.modules():
        if "Drop" in type(part).__name__:  # dropout, drop path: of no use here, and never the same twice
            part.eval()
    case.clear()
    # Images need no gradient; asking for one would compile another graph than the one that is timed.
    leaves = tuple(t.clone().requires_grad_(gradients and not case.classifies) for t in inputs)
    try:
        with torch.set_grad_enabled(gradients):
            out = case.forward(leaves)
            results = {"output": out.detach()}
            if gradients:
                generator = torch.Generator().manual_seed(0)
                cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device)
                (out * cotangent.to(out.dtype)).sum(dtype=torch.promote_types(out.dtype, torch.float32)).backward()
                named = {f"input {i}": t for i, t in enumerate(leaves)} | dict(case.module.named_parameters())
                results |= {f"gradient of {key}": t.grad for key, t in named.items() if t.grad is not None}
    finally:
        case.clear()
        for part, mode in modes.items():
            part.training = mode
    return results


def _joined(tensors: Tensors) -> Tensors:
    """All gradients as one: those of single scalars, in a whole network, are sums in which almost all cancels."""
    output, *gradients = tensors.values()
    joined = {"gradients": torch.cat([t.double().flatten() for t in gradients])} if gradients else {}
    return {"output": output} | joined


def _errors(tensors: Tensors, expected: Tensors) -> dict[str, float]:
    """Relative error of each tensor in the Euclidean norm; NaN, which no bound admits, where one is missing."""
    return {key: relative_error(tensors[key], value) if key in tensors else math.nan for key, value in expected.items()}
