"""The implementations of the convolution path: what each can run, and where it is the fastest."""

from acmix.ops import native
from acmix.ops.implementations import Implementation, Operation, Problem, compilation_declines

# Folding takes 27N products for each output channel, the two steps 27 + 81: with many heads they are the cheaper.
MAX_FOLDED_HEADS = 4


def unfolded_declines(problem: Problem) -> str | None:
    """The two steps win, on a CPU, where they need fewer products and the maps need no reordering."""
    if problem.device.type == "cpu" and problem.channels_last and problem.heads > MAX_FOLDED_HEADS:
        return None
    return f"it is the fastest only on a CPU, for channels_last maps of more than {MAX_FOLDED_HEADS} heads"


def cpp_refusal(problem: Problem) -> str | None:
    """C++ needs the CPU and a compiler that accepts the source."""
    return native.refusal("shift_conv/convolution.cpp", problem.device, problem.dtype)


def dense_declines(problem: Problem) -> str | None:
    """Without groups, most of the products are with zeros."""
    return f"it takes {problem.head_dim} times the products"


SHIFT_CONV = Operation(
    "shift_conv",
    Implementation("unfolded", declines=unfolded_declines),
    Implementation("cpp", "acmix.ops.shift_conv.cpp", cpp_refusal, compilation_declines),
    Implementation("folded", "acmix.ops.shift_conv.folded"),
    Implementation("dense", declines=dense_declines),
    Implementation("reference"),
)
