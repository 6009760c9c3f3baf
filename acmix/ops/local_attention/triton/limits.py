"""What the Triton kernels of local attention can run; importing this needs no Triton."""

from acmix.ops.gpu import gpu_refusal
from acmix.ops.implementations import Problem

MAX_HEAD_DIM = 256
MAX_REACH = 24


def triton_refusal(problem: Problem) -> str | None:
    """Why these kernels cannot run this problem, or None if they can; see `gpu_refusal`."""
    if (refusal := gpu_refusal(problem)) is not None:
        return refusal
    if problem.head_dim > MAX_HEAD_DIM:
        return f"head width {problem.head_dim} is more than {MAX_HEAD_DIM}"
    if problem.window.reach > MAX_REACH:
        return (
            f"a window that reaches {problem.window.reach} pixels is wider than the {MAX_REACH} that a tile can stream"
        )
    return None
