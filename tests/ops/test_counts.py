"""What PyTorch's FlopCounterMode counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from acmix import ACmix
from acmix.ops import local_attention, shift_conv
from acmix.ops.native import cxx_compiler
from acmix.telemetry.flops import count_multiply_adds
from acmix.testing import AttentionCase, ShiftConvCase

CPP = pytest.param("cpp", marks=pytest.mark.skipif(cxx_compiler() is None, reason="needs a C++ compiler"))


@pytest.mark.parametrize("impl", ["auto", "dense", "tiled", CPP])
def test_attention_counts_both_products_of_the_window_and_twice_that_backward(impl):
    case = AttentionCase(heads=2, head_dim=4, height=9, width=10, kernel_size=5, stride=2, batch=3)
    leaves = [t.requires_grad_() for t in case.inputs()[:4]]
    with FlopCounterMode(display=False) as forward:
        out = local_attention(*leaves, case.kernel_size, case.stride, impl)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert forward.get_total_flops() == 2 * (2 * 5**2 * out.numel())
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


@pytest.mark.parametrize("impl", ["auto", "folded", "unfolded", CPP])
def test_the_convolution_counts_both_steps_of_the_paper_and_twice_that_backward(impl):
    case = ShiftConvCase(heads=2, head_dim=4, height=14, width=13, stride=2, batch=3)
    leaves = [t.requires_grad_() for t in case.inputs()[:5]]
    with FlopCounterMode(display=False) as forward:
        out = shift_conv(*leaves, stride=2, impl=impl)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert forward.get_total_flops() == 2 * (9 * 3 * leaves[0].numel() + 81 * out.numel())
    if impl != "unfolded":  # its gradients are PyTorch's, and so is their count
        assert backward.get_total_flops() == 2 * forward.get_total_flops()


def test_a_block_counts_as_in_our_tables():
    block, x = ACmix(16, 32, stride=2), torch.randn(2, 16, 15, 14)
    with FlopCounterMode(display=False) as counter:
        block(x)
    assert counter.get_total_flops() == 2 * count_multiply_adds(block, x)
