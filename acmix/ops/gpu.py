"""What the operations written in Triton share: devices, dtypes, sizes. Importing this needs no Triton."""

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from acmix.ops.implementations import Problem

MAX_BATCH = 65535  # an axis of the grid that is not the first
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MIN_CAPABILITY = (8, 0)
_INSTALLED = importlib.util.find_spec("triton") is not None


def gpu_refusal(problem: Problem) -> str | None:
    """Why no kernel in Triton can run this problem, or None. Neither launches nor compiles anything.

    `TRITON_INTERPRET=1` in the environment lets CPU tensors through: the kernels then run in Triton's interpreter. As
    for Triton itself, what it was at the start counts.
    """
    if not _INSTALLED:
        return "Triton is not installed (pip install triton)"
    if (refusal := _device_refusal(problem.device)) is not None:
        return refusal
    if problem.dtype not in _DTYPES:
        return f"dtype {problem.dtype} is not one of float32, bfloat16, float16"
    if problem.shape[0] > MAX_BATCH:
        return f"batch size {problem.shape[0]} is more than the {MAX_BATCH} that one launch takes"
    return None


def device_guard(maps: Tensor) -> AbstractContextManager[Any]:
    """Make the tensors' device current: Triton launches on the current device and its current stream."""
    return torch.cuda.device(maps.device) if maps.is_cuda else nullcontext()


def power_of_two(value: int) -> int:
    """The smallest power of two that is at least `value`: the size of a range in Triton."""
    return 1 << max(value - 1, 0).bit_length()


@torch.compiler.assume_constant_result
def _device_refusal(device: torch.device) -> str | None:
    return _known_device_refusal(device)


@cache
def _known_device_refusal(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None if os.environ.get("TRITON_INTERPRET") == "1" else f"the tensors are on {device}, not on CUDA"
    if not torch.cuda.is_available():  # tensors of a FakeTensorMode, which need no GPU
        return "there is no GPU"
    if torch.cuda.get_device_capability(device) < _MIN_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is older than compute capability {_MIN_CAPABILITY[0]}.0"
    return None
