"""The choice of an implementation, the same for every operation.

A predicate named `..._refusal` returns None, or the reason why an implementation cannot run a call, in words a person
can act on; one named `..._declines` returns None, or why `auto` passes over an implementation that could run. An
implementation asked for by name runs or raises; it is never replaced.
"""

import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from acmix.ops.maps import are_dynamic, is_channels_last, is_exporting

DEBUG = os.environ.get("ACMIX_DEBUG") == "1"
# Former names, still accepted wherever an `impl` is given.
ALIASES = {"compiled": "cpp", "halo": "tiled"}


@dataclass(frozen=True)
class Window:
    """A K × K window of pixels around every stride-th pixel of a map.

    Raises:
        ValueError: for an even kernel_size, or a stride or dilation below 1.
    """

    kernel_size: int
    """K, odd."""
    stride: int
    """Distance of neighbouring windows, in pixels."""
    dilation: int
    """Distance of neighbouring members of a window, in pixels."""

    def __post_init__(self) -> None:
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(
                f"kernel_size {self.kernel_size} has no centre pixel: choose an odd size, such as "
                f"{max(self.kernel_size, 0) + 1}"
            )
        if self.stride < 1 or self.dilation < 1:
            raise ValueError(
                f"stride and dilation must be at least 1, got stride {self.stride} and dilation {self.dilation}"
            )

    @property
    def reach(self) -> int:
        """Pixels from the centre of a window to its edge; also the padding that keeps the size of a map."""
        return self.dilation * (self.kernel_size // 2)

    def on(self, height: int, width: int) -> "Window":
        """The largest window up to this one that reaches less far than the shorter side of a map: 1 × 1 on one pixel.

        Reflection needs that. It is this window where the map is large enough, or of any size in a graph being traced:
        the operation asks again when it runs.
        """
        if are_dynamic((height, width)):
            return self
        shorter = min(int(height), int(width))  # tensors in torch.jit.trace
        if self.reach < shorter:
            return self
        return Window(2 * (max(0, shorter - 1) // self.dilation) + 1, self.stride, self.dilation)

    def out_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of windows on a map: ceil(H / stride), ceil(W / stride)."""
        return -(-height // self.stride), -(-width // self.stride)


@dataclass(frozen=True)
class Problem:
    """One call of an operation: all that the choice of an implementation depends on."""

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]
    """(B, C, H, W) of q, and of k and v unless `uneven`."""
    heads: int
    window: Window
    channels_last: bool = False
    may_compile: bool = False
    """Whether `auto` may take what has to be compiled first; see `may_compile()`."""
    uneven: bool = False
    """Whether q, k and v have different numbers of heads."""
    transformed: bool = False
    """Whether torch.func, forward-mode AD or export to ONNX takes part; see `transformed()`."""

    @classmethod
    def of(cls, q: Tensor, heads: int, window: Window) -> "Problem":
        """The problem of a call with maps like `q`."""
        shape: tuple[int, ...] = q.shape
        if torch.jit.is_tracing():  # its sizes are tensors
            shape, heads = tuple(map(int, shape)), int(heads)
        return cls(
            q.device, q.dtype, shape, heads, window,
            channels_last=is_channels_last(q), may_compile=may_compile(), transformed=transformed(),
        )  # fmt: skip

    @property
    def head_dim(self) -> int:
        return self.shape[1] // self.heads

    @property
    def any_size(self) -> bool:
        """Whether it stands for maps of any height or width."""
        return are_dynamic(self.shape[2:])

    def __str__(self) -> str:
        layout = ", channels_last" if self.channels_last else ""
        return (
            f"{'×'.join(map(str, self.shape))} {str(self.dtype).removeprefix('torch.')} on {self.device}{layout}, "
            f"head_dim {self.head_dim}, kernel_size {self.window.kernel_size}, stride {self.window.stride}, "
            f"dilation {self.window.dilation}"
        )


def transformed() -> bool:
    """Whether a transform of torch.func (vmap, grad, ...), forward-mode AD or export to ONNX looks at every operation.

    They need batching rules, forward derivatives and translations, which PyTorch's own operations have and a custom one
    has not: vmap and the export would fail on it, and a forward derivative would silently leave it out.
    """
    looked_at = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    traced = torch.jit.is_tracing() or is_exporting()  # asked first: the other takes microseconds
    return looked_at or (traced and torch.onnx.is_in_onnx_export())


def may_compile() -> bool:
    """Whether `auto` may take an implementation that has to be compiled first, by ACMIX_COMPILE in the environment.

    `always`, the default: at some seconds for each new window size and dtype, once for a machine. `traced`: only
    inside torch.compile, whose caller waits for compilers anyway. `never`: nowhere. torch.export never may: its result
    outlives this machine.

    Raises:
        ValueError: for another value.
    """
    choice = os.environ.get("ACMIX_COMPILE", "always")
    if choice not in ("never", "traced", "always"):
        raise ValueError(f"ACMIX_COMPILE is {choice!r}: choose never, traced or always")
    if is_exporting():
        return False
    return choice == "always" or (choice == "traced" and torch.compiler.is_compiling())


def compilation_declines(problem: Problem) -> str | None:
    """Why `auto` does not compile anything for this problem, or None."""
    return None if problem.may_compile else "ACMIX_COMPILE or torch.export keeps auto from compiling here"


def _never(problem: Problem) -> None:
    """For an implementation without limits."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation."""

    name: str
    module: str | None = None
    """Module with `forward` and `backward`; None where the public operation runs it in differentiable PyTorch."""
    refusal: Callable[[Problem], str | None] = _never
    declines: Callable[[Problem], str | None] = _never

    def transform_refusal(self, problem: Problem) -> str | None:
        """Why it cannot run inside a transform of torch.func or forward-mode AD, or None."""
        if problem.transformed and self.module:
            return "it lacks the rules of torch.func, forward-mode AD and ONNX, which impl='reference' has"
        return None

    def auto_refusal(self, problem: Problem) -> str | None:
        """Why `auto` does not take it for this problem, or None. What auto declines is not asked whether it can run:
        the answer may take a compiler."""
        return self.transform_refusal(problem) or self.declines(problem) or self.refusal(problem)


class Operation:
    """An operation and its implementations, in the order in which `auto` prefers them; the last can always run."""

    def __init__(self, name: str, *implementations: Implementation) -> None:
        self.name = name
        self.implementations = {implementation.name: implementation for implementation in implementations}

    @property
    def names(self) -> tuple[str, ...]:
        """What an `impl` may be, besides `auto` and the former names."""
        return tuple(self.implementations)

    def canonical(self, impl: str) -> str:
        """`auto`, or the present name of the implementation that `impl` names.

        Raises:
            ValueError: if there is none.
        """
        name = ALIASES.get(impl, impl)
        if name != "auto" and name not in self.implementations:
            raise ValueError(f"unknown impl {impl!r}: choose auto or one of {', '.join(self.implementations)}")
        return name

    def resolve(self, impl: str, problem: Problem) -> str:
        """The name of the implementation to run.

        Raises:
            ValueError: if `impl` is unknown or cannot run this problem; the message holds the reason.
        """
        name = self.canonical(impl)
        if name == "auto":
            name = self.preferred(problem)
        elif refusal := self._refusal(name, problem):
            raise ValueError(f"impl {impl!r} cannot run {self.name} for {problem}: {refusal}; impl='auto' chooses one")
        if announcing():
            self.announce(name, problem)
        return name

    def _refusal(self, name: str, problem: Problem) -> str | None:
        implementation = self.implementations[name]
        return implementation.transform_refusal(problem) or implementation.refusal(problem)

    def preferred(self, problem: Problem) -> str:
        """The name of the implementation that `auto` stands for."""
        for name, implementation in self.implementations.items():
            if implementation.auto_refusal(problem) is None:
                return name
        raise AssertionError("the last implementation can always run")

    def announce(self, name: str, problem: Problem) -> None:
        """Print once to stderr that `name` runs this problem, and what `auto` has against those it prefers to it."""
        reasons = []
        for other, implementation in self.implementations.items():
            if other == name:
                break
            reasons.append((other, implementation.auto_refusal(problem)))
        note = "; ".join(f"{other}: {reason}" for other, reason in reasons if reason)
        print_once(f"acmix: {self.name} {problem}: {name}" + (f" ({note})" if note else ""))

    def load(self, impl: str) -> ModuleType:
        """The module of an implementation, imported when it is first needed."""
        module = self.implementations[ALIASES.get(impl, impl)].module
        assert module is not None
        return _import_once(module)


def announcing() -> bool:
    """Whether choices are announced: with ACMIX_DEBUG=1 at the start, and not while a graph is being traced."""
    return DEBUG and not torch.compiler.is_compiling()


_import_once = functools.cache(import_module)


@functools.cache
def print_once(line: str) -> None:
    """Print to stderr what has not been printed yet."""
    print(line, file=sys.stderr)
