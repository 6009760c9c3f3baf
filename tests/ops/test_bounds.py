"""The C++ implementations touch no byte before or behind a map: pages that may not be touched lie on both sides."""

import ctypes
import math
import mmap
import sys

import pytest
import torch
from torch import Tensor

from acmix.ops import native
from acmix.ops.implementations import Window
from acmix.ops.local_attention import cpp as attention
from acmix.ops.shift_conv import cpp as convolution
from acmix.ops.window_attention import cpp as window_attention

pytestmark = [
    pytest.mark.skipif(native.cxx_compiler() is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(sys.platform != "linux", reason="protects pages as Linux does"),
]

SIZES = [  # heads, head_dim, height, width, kernel_size, stride, dilation
    (4, 6, 7, 9, 3, 1, 1),
    (3, 4, 9, 8, 3, 2, 1),
    (2, 20, 33, 17, 3, 2, 1),
    (1, 8, 11, 7, 5, 1, 2),
    (4, 4, 16, 16, 7, 1, 1),
    (2, 32, 14, 14, 3, 1, 1),
    (5, 1, 2, 2, 3, 1, 1),
    (2, 16, 8, 8, 3, 1, 1),
    (4, 16, 4, 4, 3, 1, 1),
    (8, 16, 2, 2, 3, 1, 1),
]


WINDOWS = [  # heads, head_dim, height, width, rows and columns of a window, rows and columns of the shift
    (3, 5, 6, 9, 3, 3, 1, 0),
    (2, 32, 14, 14, 7, 7, 3, 3),
    (1, 20, 4, 4, 4, 4, 0, 0),
]


class Fenced:
    """Makes maps (B, C, H, W) that begin or end where a page may not be touched."""

    def __init__(self, dtype: torch.dtype, *, channels_last: bool, at_end: bool) -> None:
        self.dtype, self.channels_last, self.at_end = dtype, channels_last, at_end
        self._memory: list[mmap.mmap] = []

    def empty(self, *shape: int) -> Tensor:
        size, page = math.prod(shape) * self.dtype.itemsize, mmap.PAGESIZE
        pages = -(-size // page)
        memory = mmap.mmap(-1, (pages + 2) * page)
        self._memory.append(memory)
        first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for fence in (first, first + (pages + 1) * page):
            assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(fence), ctypes.c_size_t(page), 0) == 0
        start = page + (pages * page - size if self.at_end else 0)
        flat = torch.frombuffer(memory, dtype=self.dtype, count=math.prod(shape), offset=start)
        if not self.channels_last:
            return flat.view(shape)
        batch, channels, height, width = shape
        return flat.view(batch, height, width, channels).permute(0, 3, 1, 2)

    def drawn(self, *shape: int) -> Tensor:
        return self.empty(*shape).copy_(torch.randn(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("at_end", [True, False], ids=["end", "begin"])
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
def test_nothing_outside_the_maps_is_touched(dtype, channels_last, at_end):
    maps = Fenced(dtype, channels_last=channels_last, at_end=at_end)
    for heads, head_dim, height, width, *numbers in SIZES:
        window, shape = Window(*numbers), (1, heads * head_dim, height, width)
        out_shape = (*shape[:2], *window.out_size(height, width))
        inputs, grads = [maps.drawn(*shape) for _ in range(3)], [maps.drawn(*shape) for _ in range(3)]
        out, grad_out = maps.drawn(*out_shape), maps.drawn(*out_shape)
        weight = torch.randn(shape[1], 3 * heads, window.kernel_size, window.kernel_size)
        convolution.forward_into(out, inputs, weight, window)
        convolution.backward_into(grads, grad_out, inputs, weight, window)
        position, lse = torch.randn(head_dim, 2), attention.empty_lse(inputs[0], head_dim, window)
        attention.attend(*inputs, position, window, out, lse, accumulate=True)
        attention.attend_backward(grad_out, *inputs, position, window, lse, *grads, accumulate=True)
        assert all(m.isfinite().all() for m in (out, *grads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_end", [True, False], ids=["end", "begin"])
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
def test_window_attention_touches_nothing_outside_its_maps(dtype, channels_last, at_end):
    maps = Fenced(dtype, channels_last=channels_last, at_end=at_end)
    for heads, head_dim, height, width, *windows in WINDOWS:
        shape, area = (2, heads * head_dim, height, width), windows[0] * windows[1]
        q, k, v, grad_out, *grads = [maps.drawn(*shape) for _ in range(7)]
        bias = maps.drawn(1, heads, area, area)[0].float()
        window_attention.forward(q, k, v, bias, windows)
        window_attention.backward_into(grads, grad_out, [q, k, v], bias, windows, accumulate=True)
        assert all(m.isfinite().all() for m in grads)
