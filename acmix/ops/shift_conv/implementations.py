"""The implementations of the convolution path: what each can run, and where it is the fastest."""

from acmix.ops import native
from acmix.ops.gpu import gpu_refusal
from acmix.ops.implementations import Implementation, Operation, Problem, compilation_declines

# Folding takes 27N products for each output channel, the two steps 27 + 81: with many heads they are the cheaper. The
# folded convolution in C++ runs so much nearer to what the processor can do that it wins up to 8 heads; measured.
MAX_FOLDED_HEADS = 4
MAX_CPP_HEADS = 8
MAX_DENSE_HEADS = 8  # on an H200; there the folded convolution in Triton wins up to MAX_FOLDED_HEADS
_EVEN = "it takes q, k and v of as many heads each only"


def triton_declines(problem: Problem) -> str | None:
    """Its products are those of the folded convolution, without tensor cores."""
    if problem.heads <= MAX_FOLDED_HEADS:
        return None
    return f"it is the fastest up to {MAX_FOLDED_HEADS} heads"


def unfolded_declines(problem: Problem) -> str | None:
    """The two steps win where they need far fewer products."""
    most = MAX_FOLDED_HEADS
    if problem.device.type == "cpu":
        most = MAX_CPP_HEADS if problem.may_compile else MAX_FOLDED_HEADS
    elif not problem.uneven:
        most = MAX_DENSE_HEADS
    return None if problem.heads > most else f"it is the fastest only for more than {most} heads"


def cpp_refusal(problem: Problem) -> str | None:
    """C++ needs q, k and v of one shape, the CPU and a compiler that accepts the source."""
    if problem.uneven:
        return _EVEN
    return native.refusal("shift_conv/convolution.cpp", problem.device, problem.dtype)


def dense_refusal(problem: Problem) -> str | None:
    """Its one weight is laid out for 3N maps."""
    return _EVEN if problem.uneven else None


def dense_declines(problem: Problem) -> str | None:
    """Without groups, most of the products are with zeros; the tensor cores of a GPU hardly notice."""
    if problem.uneven:
        return _EVEN
    if problem.device.type == "cuda" and MAX_FOLDED_HEADS < problem.heads <= MAX_DENSE_HEADS:
        return None
    return f"it takes {problem.head_dim} times the products"


SHIFT_CONV = Operation(
    "shift_conv",
    Implementation("triton", "acmix.ops.shift_conv.triton.kernels", gpu_refusal, triton_declines),
    Implementation("unfolded", declines=unfolded_declines),
    Implementation("cpp", "acmix.ops.shift_conv.cpp", cpp_refusal, compilation_declines),
    Implementation("dense", None, dense_refusal, dense_declines),
    Implementation("folded", "acmix.ops.shift_conv.folded"),
    Implementation("reference"),
)
