"""The implementations of local attention: what each can run, and where it is the fastest."""

from acmix.ops import native
from acmix.ops.implementations import Implementation, Operation, Problem, compilation_declines
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
    """Dense attention wins on small maps only: up to a few times the pixels of a window, as measured on a CPU."""
    if problem.any_size:
        return "it is faster on small maps only, and these may have any size"
    keys, members = problem.shape[2] * problem.shape[3], problem.window.kernel_size**2
    limit, rival = 4 * members, "cpp"
    if keys > limit and _CPP.auto_refusal(problem):
        limit, rival = (9 if problem.window.stride == 1 else 16) * members, "tiled"
    if keys > limit:
        return f"{keys} keys are more than the {limit} up to which it is faster than {rival}"
    return None


def cpp_refusal(problem: Problem) -> str | None:
    """C++ needs the CPU and a compiler that accepts the source."""
    source, kernel_size = "local_attention/attention.cpp", problem.window.kernel_size
    return native.refusal(source, problem.device, problem.dtype, kernel_size)


_CPP = Implementation("cpp", "acmix.ops.local_attention.cpp", cpp_refusal, compilation_declines)

LOCAL_ATTENTION = Operation(
    "local_attention",
    Implementation("triton", "acmix.ops.local_attention.triton.kernels", triton_refusal),
    Implementation("dense", "acmix.ops.local_attention.dense", dense_refusal, dense_declines),
    _CPP,
    Implementation("tiled", "acmix.ops.local_attention.tiled"),
    Implementation("reference"),
)
