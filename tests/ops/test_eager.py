"""Eager calls, which go past the dispatcher, see what a tensor stands for and not only what lies in memory."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from acmix.layers import ACmix
from acmix.ops import local_attention, shift_conv
from acmix.testing import AttentionCase, ShiftConvCase


def attention() -> tuple[Callable[..., Tensor], list[Tensor]]:
    return lambda *tensors: local_attention(*tensors, 3), AttentionCase(2, 4, 6, 5, 3).inputs()[:4]


def convolution() -> tuple[Callable[..., Tensor], list[Tensor]]:
    return shift_conv, ShiftConvCase(2, 4, 6, 5).inputs()[:5]


def block() -> tuple[Callable[..., Tensor], list[Tensor]]:
    torch.manual_seed(0)
    return ACmix(8, 8, heads=2), [torch.randn(2, 8, 6, 5)]


EACH = pytest.mark.parametrize("operation", [attention, convolution, block])


def negated(tensor: Tensor) -> Tensor:
    """The same numbers, of which the negatives lie in memory."""
    lazy = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
    assert lazy.is_neg()
    return lazy


@EACH
def test_negated_views_are_taken_for_what_they_are(operation):
    run, inputs = operation()
    torch.testing.assert_close(run(*map(negated, inputs)), run(*inputs), rtol=0, atol=0)
    leaves = [t.requires_grad_() for t in inputs]
    out = run(*leaves)
    gradient = torch.linspace(-1, 1, out.numel()).view_as(out)
    expected = torch.autograd.grad(out, leaves, gradient, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(out, leaves, negated(gradient)), expected, rtol=0, atol=0)


@EACH
def test_zeros_that_take_no_memory_give_gradients_of_zero(operation):
    run, inputs = operation()
    leaves = [t.requires_grad_() for t in inputs]
    out = run(*leaves)
    assert all((g == 0).all() for g in torch.autograd.grad(out, leaves, torch._efficientzerotensor(out.shape)))
