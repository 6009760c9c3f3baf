"""The implementations of local attention: what each can run, and where it is the fastest."""

import sys

import torch

from acmix.ops import native
from acmix.ops.implementations import Implementation, Operation, Problem, Window, compilation_declines
from acmix.ops.local_attention.triton.limits import triton_refusal

MAX_BIAS_BYTES = 2**30


def dense_refusal(problem: Problem) -> str | None:
    """Dense attention runs anywhere, as long as its bias fits."""
    height, width = problem.shape[2:]
    rows, columns = problem.window.out_size(height, width)
    size = 4 * rows * columns * height * width
    if size > MAX_BIAS_BYTES:
        return f"its bias for {rows * columns} queries and {height * width} keys would take {size / 2**30:.1f} GiB"
    return None


def dense_declines(problem: Problem) -> str | None:
    """Dense attention wins on small maps only: up to about the pixels of a window, as measured on a CPU."""
    if problem.any_size:
        return "it is faster on small maps only, and these may have any size"
    keys, members = problem.shape[2] * problem.shape[3], problem.window.kernel_size**2
    limit, rival = max(members // 2, 1) if problem.channels_last else max(members, 16), "cpp"
    if keys > limit and _CPP.auto_refusal(problem):
        limit, rival = (9 if problem.window.stride == 1 else 16) * members, "tiled"
    if keys > limit:
        return f"{keys} keys are more than the {limit} up to which it is faster than {rival}"
    return None


def cpp_refusal(problem: Problem) -> str | None:
    """C++ needs the CPU and a compiler that accepts the source."""
    width = sys.maxsize if problem.any_size else problem.window.out_size(*problem.shape[2:])[1]
    macros = cpp_macros(problem.dtype, problem.head_dim, problem.window, width)
    return native.refusal("local_attention/attention.cpp", problem.device, problem.dtype, **macros)


def cpp_macros(dtype: torch.dtype, head_dim: int, window: Window, out_width: int) -> dict[str, int]:
    """What the C++ source is compiled for: window size, and numbers per vector of pixels and of channels."""
    wide = torch.promote_types(dtype, torch.float32)
    most = native.lanes(sys.maxsize, wide)
    divisor = min(most, head_dim & -head_dim)
    # vectors that the head width fills, unless they were short; else the rest of the last one is zeros
    channels = divisor if divisor > 1 and 2 * divisor >= most else min(most, max(4, 1 << (head_dim - 1).bit_length()))
    return {"K": window.kernel_size, "LANES": native.lanes(out_width, wide), "CHANNELS": channels}


_CPP = Implementation("cpp", "acmix.ops.local_attention.cpp", cpp_refusal, compilation_declines)

LOCAL_ATTENTION = Operation(
    "local_attention",
    Implementation("triton", "acmix.ops.local_attention.triton.kernels", triton_refusal),
    Implementation("dense", "acmix.ops.local_attention.dense", dense_refusal, dense_declines),
    _CPP,
    Implementation("tiled", "acmix.ops.local_attention.tiled"),
    Implementation("reference"),
)
