"""Which implementation may run here, which one runs best, and the reason when one may not.

A predicate `can_run_*` returns None or the reason, in words a person can act on. An implementation asked for by name
runs or raises; it is never replaced. `auto` takes the first of its order of preference that can run and pays off.
"""

import functools
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

ATTENTION_IMPLS = ("reference", "dense", "halo", "compiled", "triton")
SHIFT_CONV_IMPLS = ("reference", "folded", "unfolded", "compiled", "dense")
# Folding takes 27N products for each output channel, the two steps 27 + 81: with many heads they are the cheaper.
MAX_FOLDED_HEADS = 4
MAX_BIAS_BYTES = 2**30


@dataclass(frozen=True)
class Problem:
    """What the choice of an implementation depends on: one call of local attention."""

    device: str
    dtype: torch.dtype
    shape: tuple[int, int, int, int]  # B, C, H, W
    head_dim: int
    kernel_size: int
    stride: int
    dilation: int
    may_compile: bool = False  # whether auto may take what has to be compiled first; see may_compile()
    triton_refusal: str | None = None
    compiled_refusal: str | None = None  # what the C++ compiler said

    @property
    def keys(self) -> int:
        return self.shape[2] * self.shape[3]

    @property
    def queries(self) -> int:
        return -(-self.shape[2] // self.stride) * -(-self.shape[3] // self.stride)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{'×'.join(map(str, self.shape))} {dtype} on {self.device}, head_dim {self.head_dim}, kernel_size "
            f"{self.kernel_size}, stride {self.stride}, dilation {self.dilation}"
        )


@functools.cache
def cxx_compiler() -> str | None:
    """Path of the C++ compiler, $CXX or else the first found, or None."""
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "c++"]
    return next((path for path in map(shutil.which, names) if path), None)


def can_run_reference(problem: Problem) -> str | None:
    """The reference runs everywhere."""
    return None


def can_run_dense(problem: Problem) -> str | None:
    """Dense attention runs anywhere, as long as its bias fits."""
    size = 4 * problem.queries * problem.keys
    if size > MAX_BIAS_BYTES:
        return f"its bias for {problem.queries} queries and {problem.keys} keys would take {size / 2**30:.1f} GiB"
    return None


def can_run_halo(problem: Problem) -> str | None:
    """Blocks with a halo run anywhere."""
    return None


def can_run_compiled(problem: Problem) -> str | None:
    """The compiled implementation needs the CPU and a C++ compiler that accepts it."""
    return not_compiled(problem.device, problem.compiled_refusal)


def not_compiled(device: str, compiler_refusal: str | None) -> str | None:
    """Why C++ cannot run for tensors on `device`, given what the compiler said, or None."""
    if device != "cpu":
        return f"it is written for the CPU, the tensors are on {device}"
    return compiler_refusal


def can_run_triton(problem: Problem) -> str | None:
    """Triton's own answer for this problem."""
    return problem.triton_refusal


_PREDICATES: dict[str, Callable[[Problem], str | None]] = {
    "reference": can_run_reference,
    "dense": can_run_dense,
    "halo": can_run_halo,
    "compiled": can_run_compiled,
    "triton": can_run_triton,
}


_PREFERENCE = ("triton", "dense", "compiled", "halo")


def pays_dense(problem: Problem) -> str | None:
    """Why dense attention would lose against its rival here, or None. The crossovers are measured, on a CPU."""
    if problem.may_compile and can_run_compiled(problem) is None:
        limit, rival = 4 * problem.kernel_size**2, "compiled"
    else:
        limit, rival = problem.kernel_size**2 * (9 if problem.stride == 1 else 16), "halo"
    if problem.keys > limit:
        return f"{problem.keys} keys are more than the {limit} up to which it is faster than {rival}"
    return None


def _declines(name: str, problem: Problem) -> str | None:
    """Why `auto` does not take an implementation, or None."""
    refusal = _PREDICATES[name](problem)
    if refusal is None and name == "dense":
        refusal = pays_dense(problem)
    if refusal is None and name == "compiled" and not problem.may_compile:
        refusal = "ACMIX_COMPILE or torch.export keeps auto from compiling here"
    return refusal


def resolve(impl: str, problem: Problem) -> str:
    """The implementation to run.

    Raises:
        ValueError: if `impl` is unknown or cannot run this problem; the message holds the reason.
    """
    if impl == "auto":
        return next(name for name in _PREFERENCE if _declines(name, problem) is None)
    if impl not in _PREDICATES:
        raise ValueError(f"unknown impl {impl!r}: choose auto or one of {', '.join(ATTENTION_IMPLS)}")
    refusal = _PREDICATES[impl](problem)
    if refusal is not None:
        raise ValueError(f"impl {impl!r} cannot run local attention for {problem}: {refusal}; impl='auto' chooses one")
    return impl


def resolve_shift_conv(
    impl: str,
    device: str,
    may_compile: bool,
    compiled_refusal: str | None = None,
    *,
    channels_last: bool = False,
    heads: int = 1,
) -> str:
    """The implementation of the convolution path to run.

    On a CPU `auto` takes `unfolded` for channels_last maps of many heads, otherwise `compiled` where it may compile;
    everywhere else `folded`.

    Raises:
        ValueError: if `impl` is unknown or cannot run on this device; the message holds the reason.
    """
    refusal = not_compiled(device, compiled_refusal)
    if impl == "auto":
        if device == "cpu" and channels_last and heads > MAX_FOLDED_HEADS:
            return "unfolded"
        return "compiled" if may_compile and refusal is None else "folded"
    if impl not in SHIFT_CONV_IMPLS:
        raise ValueError(f"unknown impl {impl!r}: choose auto or one of {', '.join(SHIFT_CONV_IMPLS)}")
    if impl == "compiled" and refusal is not None:
        raise ValueError(f"impl 'compiled' cannot run the convolution path: {refusal}; impl='auto' chooses one")
    return impl


def may_compile() -> bool:
    """Whether `auto` may take an implementation that has to be compiled first, by ACMIX_COMPILE in the environment.

    `always`, the default: at a second or two for each new window size and dtype, once for a machine. `traced`: only
    inside torch.compile, whose caller waits for compilers anyway. `never`: nowhere. torch.export never may: its result
    outlives this machine.

    Raises:
        ValueError: for another value.
    """
    choice = os.environ.get("ACMIX_COMPILE", "always")
    if choice not in ("never", "traced", "always"):
        raise ValueError(f"ACMIX_COMPILE is {choice!r}: choose never, traced or always")
    if torch.compiler.is_exporting():
        return False
    return choice == "always" or (choice == "traced" and torch.compiler.is_compiling())


def announce(impl: str, problem: Problem) -> None:
    """With ACMIX_DEBUG=1, print once for each problem which implementation runs and what the others said."""
    if os.environ.get("ACMIX_DEBUG") == "1":
        _announce(impl, problem)


@functools.cache
def _announce(impl: str, problem: Problem) -> None:
    others = ((name, _declines(name, problem)) for name in _PREFERENCE if name != impl)
    reasons = "; ".join(f"{name}: {reason}" for name, reason in others if reason)
    print(f"acmix: local_attention {problem}: {impl}" + (f" ({reasons})" if reasons else ""), file=sys.stderr)


def announce_shift_conv(impl: str, device: str, shape: tuple[int, ...], may_compile: bool, refusal: str | None) -> None:
    """The same for the convolution path."""
    if os.environ.get("ACMIX_DEBUG") == "1":
        _announce_shift_conv(impl, device, shape, may_compile, refusal)


@functools.cache
def _announce_shift_conv(
    impl: str, device: str, shape: tuple[int, ...], may_compile: bool, refusal: str | None
) -> None:
    reason = not_compiled(device, refusal) or (None if may_compile else "auto takes it only where it may compile")
    note = f" (compiled: {reason})" if reason and impl != "compiled" else ""
    print(f"acmix: shift_conv {'×'.join(map(str, shape))} on {device}: {impl}{note}", file=sys.stderr)
