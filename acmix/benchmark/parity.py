"""Nothing is timed before it is shown to compute the same as the reference."""

import copy
import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from acmix.benchmark.cases import DTYPES, Case
from acmix.layers.attention import LocalAttention
from acmix.layers.convolution import ShiftConv

Tensors = dict[str, Tensor]


class ParityError(Exception):
    """An implementation that does not compute what the reference computes; the message says where and by how much."""


def check_parity(case: Case) -> None:
    """Hold output and every gradient of a case against its reference implementation in float64.

    The relative error may be at most twice that of the reference run in the case's own dtype, plus one unit of
    rounding: the bound follows from the arithmetic. A case in half precision is also checked in float32, where a slip
    at a border cannot hide in the noise. Raises ParityError.
    """
    for dtype in dict.fromkeys(["float32", case.setting.dtype]):
        _check(case, dtype)


def _check(case: Case, dtype: str) -> None:
    compiled = case.setting.compile and dtype == case.setting.dtype
    setting = replace(case.setting, dtype=dtype, compile=False)
    inputs = _inputs(case, dtype, None if compiled else 2)  # another batch size would compile once more
    plain = replace(case, module=_with_reference(case.module), setting=setting)
    exact = replace(plain, module=copy.deepcopy(plain.module).double(), setting=replace(setting, dtype="float32"))
    mine = case if compiled else replace(case, setting=setting)
    expected = _outputs(exact, tuple(t.double() for t in inputs), train=compiled)
    allowed = {k: 2 * e for k, e in _errors(_outputs(plain, inputs, train=compiled), expected).items()}
    errors = _errors(_outputs(mine, inputs, train=compiled), expected)
    unit = torch.finfo(DTYPES[dtype]).eps
    if not _norm(errors) <= _norm(allowed) + unit:  # a NaN fails
        worst = max(errors, key=lambda k: math.inf if math.isnan(errors[k]) else errors[k] / (allowed[k] + unit))
        raise ParityError(
            f"{case.label} [{case.impl}] differs from the reference in {dtype}: {worst} is off by {errors[worst]:.1e} "
            f"relative, {allowed[worst] + unit:.1e} is allowed; it is not timed"
        )


def _with_reference(module: nn.Module) -> nn.Module:
    """A copy that runs the reference implementation of every operation."""
    module = copy.deepcopy(module)
    for part in module.modules():
        if isinstance(part, (LocalAttention, ShiftConv)):
            part.impl = "reference"
    return module


def _inputs(case: Case, dtype: str, batch: int | None) -> tuple[Tensor, ...]:
    chosen = (t.detach()[:batch] for t in case.inputs)
    return tuple(t.to(DTYPES[dtype]) if not case.classifies else t for t in chosen)


def _outputs(case: Case, inputs: tuple[Tensor, ...], *, train: bool) -> Tensors:
    """The output, and the gradients of its sum of squares by all inputs and parameters, without any randomness."""
    modes = {part: part.training for part in case.module.modules()}
    case.module.train(train)
    for part in case.module.modules():
        if "Drop" in type(part).__name__:  # dropout, drop path: of no use here, and never the same twice
            part.eval()
    case.clear()
    leaves = tuple(t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs)
    out = case.forward(leaves)
    out.double().square().sum().backward()
    gradients = {f"gradient of input {i}": t.grad for i, t in enumerate(leaves)}
    gradients |= {f"gradient of {name}": parameter.grad for name, parameter in case.module.named_parameters()}
    case.clear()
    for part, mode in modes.items():
        part.training = mode
    return {"output": out.detach()} | {k: g.detach() for k, g in gradients.items() if g is not None}


def _errors(tensors: Tensors, expected: Tensors) -> dict[str, float]:
    """Relative error of each tensor in the Euclidean norm; one of no size to speak of is measured by the others'."""
    if tensors.keys() != expected.keys():
        return dict.fromkeys(expected, math.nan)
    sizes = {key: float(value.norm()) / math.sqrt(value.numel()) for key, value in expected.items()}
    floor = 1e-6 * max(sizes.values())
    return {
        key: float((tensors[key].double() - value).norm()) / math.sqrt(value.numel()) / max(sizes[key], floor)
        for key, value in expected.items()
    }


def _norm(errors: dict[str, float]) -> float:
    """Root mean square over the tensors: single ones are a lottery, one that is wrong still shows."""
    return math.sqrt(sum(error * error for error in errors.values()) / len(errors))
