"""What the Triton kernels of the convolution path can run; importing this needs no Triton."""

from acmix.ops.gpu import gpu_refusal
from acmix.ops.implementations import Problem


def triton_refusal(problem: Problem) -> str | None:
    """Why these kernels cannot run this problem, or None if they can; see `gpu_refusal`."""
    return gpu_refusal(problem)
