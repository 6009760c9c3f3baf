"""Local attention on CUDA through Triton: what it can run, forward and backward as plain functions on tensors.

Importing this module needs no Triton; the kernels are imported with the first call. Layout: any strides are read as
they are, but only channels_last maps (or channel slices of one) give vector loads; prefer them.
No atomic operations: two runs give the same bits. No buffer is larger than a map.
"""

import importlib.util
import os

import torch
from torch import Tensor

MAX_HEAD_DIM = 256
MAX_REACH = 24
MAX_BATCH = 65535  # the grid's third axis
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MIN_CAPABILITY = (8, 0)
_INSTALLED = importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result
def _device_refusal(device: torch.device) -> str | None:
    """Why the kernels cannot run on this device, or None; a constant to torch.compile."""
    if device.type != "cuda":
        return None if os.environ.get("TRITON_INTERPRET") == "1" else f"the tensors are on {device}, not on CUDA"
    if torch.cuda.get_device_capability(device) < _MIN_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is older than compute capability {_MIN_CAPABILITY[0]}.0"
    return None


def unsupported(q: Tensor, kernel_size: int, stride: int, dilation: int, head_dim: int | None = None) -> str | None:
    """Why these kernels cannot run this problem, or None if they can. Neither launches nor compiles anything.

    `TRITON_INTERPRET=1` in the environment lets CPU tensors through: the kernels then run in Triton's interpreter.
    """
    if not _INSTALLED:
        return "Triton is not installed (pip install triton)"
    if q.dtype not in _DTYPES:
        return f"dtype {q.dtype} is not one of float32, bfloat16, float16"
    if head_dim is not None and head_dim > MAX_HEAD_DIM:
        return f"head width {head_dim} is more than {MAX_HEAD_DIM}"
    if q.shape[0] > MAX_BATCH:
        return f"batch size {q.shape[0]} is more than the {MAX_BATCH} that one launch takes"
    reach = dilation * (kernel_size // 2)
    if reach > MAX_REACH:
        return f"a window that reaches {reach} pixels is wider than the {MAX_REACH} that a tile can stream"
    return _device_refusal(q.device)


def forward(
    q: Tensor, k: Tensor, v: Tensor, position_weight: Tensor, kernel_size: int, stride: int, dilation: int
) -> tuple[Tensor, Tensor]:
    """Output (B, N*d, Ho, Wo) in q's dtype and layout, and the logits' log-sum-exp (B, N, Ho, Wo), float32, nats.

    The log-sum-exp leaves out what cancels in the softmax (the query's own position); `backward` expects it so.
    Arguments as in `acmix.ops.local_attention`; the caller has checked shapes and `unsupported`.
    """
    from acmix.ops.local_attention.triton.forward import forward as run

    return run(q, k, v, position_weight, kernel_size, stride, dilation)


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_weight: Tensor,
    out: Tensor,
    lse: Tensor,
    kernel_size: int,
    stride: int,
    dilation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv, dP) of `forward`, from its inputs and both outputs; no logit was stored."""
    from acmix.ops.local_attention.triton.backward import backward as run

    return run(grad_out, q, k, v, position_weight, out, lse, kernel_size, stride, dilation)
