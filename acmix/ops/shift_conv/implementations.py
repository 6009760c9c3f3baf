"""The implementations of the convolution path: what each can run, and where it is the fastest."""

from acmix.ops import native
from acmix.ops.implementations import Implementation, Operation, Problem, compilation_declines

# Folding takes 27N products for each output channel, the two steps 27 + 81: with many heads they are the cheaper. The
# folded convolution in C++ runs so much nearer to what the processor can do that it wins up to 8 heads; measured.
MAX_FOLDED_HEADS = 4
MAX_CPP_HEADS = 8
_EVEN = "it takes q, k and v of as many heads each only"


def unfolded_declines(problem: Problem) -> str | None:
    """The two steps win, on a CPU, where they need far fewer products."""
    most = MAX_CPP_HEADS if problem.may_compile else MAX_FOLDED_HEADS
    if problem.device.type == "cpu" and problem.heads > most:
        return None
    return f"it is the fastest only on a CPU, for more than {most} heads"


def cpp_refusal(problem: Problem) -> str | None:
    """C++ needs q, k and v of one shape, the CPU and a compiler that accepts the source."""
    if problem.uneven:
        return _EVEN
    return native.refusal("shift_conv/convolution.cpp", problem.device, problem.dtype)


def dense_refusal(problem: Problem) -> str | None:
    """Its one weight is laid out for 3N maps."""
    return _EVEN if problem.uneven else None


def dense_declines(problem: Problem) -> str | None:
    """Without groups, most of the products are with zeros."""
    return f"it takes {problem.head_dim} times the products"


SHIFT_CONV = Operation(
    "shift_conv",
    Implementation("unfolded", declines=unfolded_declines),
    Implementation("cpp", "acmix.ops.shift_conv.cpp", cpp_refusal, compilation_declines),
    Implementation("folded", "acmix.ops.shift_conv.folded"),
    Implementation("dense", refusal=dense_refusal, declines=dense_declines),
    Implementation("reference"),
)
