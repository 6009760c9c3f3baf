"""Operations without the dispatcher, whose wrappers in Python take longer than the work on a small map."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from acmix.ops.implementations import transformed
from acmix.ops.maps import without_autocast


def is_eager(*tensors: Tensor) -> bool:
    """Whether nobody looks at the operations that are called: no compiler, no tracer, no dispatch mode, which counts
    multiply-adds or makes fake tensors, and no subclass of a tensor; and whether the tensors lie in memory as they are,
    which only the dispatcher sees to."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and all(type(tensor) in (Tensor, Parameter) and not _is_lazy(tensor) for tensor in tensors)
    )


def call(
    forward: Callable[..., Iterable[Tensor]],
    backward: Callable[..., Sequence[Tensor]],
    derivative: Callable[..., Sequence[Tensor]],
    plain: Callable[..., Sequence[Tensor]],
    *inputs: Tensor,
) -> Tensor:
    """An operation whose gradients autograd knows. The functions live as long as the graph: they must hold no tensors.

    Args:
        forward: The inputs → the output, and what else the backward pass needs.
        backward: The output's gradient, the inputs and what else `forward` gave → the gradients of the inputs.
        derivative: The same, by operations that autograd can differentiate and take many gradients at once.
        plain: The output's gradient and the inputs → the gradients of the inputs, in plain PyTorch; for a backward pass
            inside a transform of torch.func.
    """
    out: Tensor = _Eager.apply(forward, backward, derivative, plain, *inputs)
    return out


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, forward: Any, backward: Any, derivative: Any, plain: Any, *inputs: Tensor) -> Tensor:
        out, *kept = forward(*inputs)
        ctx.save_for_backward(*inputs, *kept)
        ctx.inputs, ctx.passes = len(inputs), (backward, derivative, plain)
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        backward, derivative, plain = ctx.passes
        saved = ctx.saved_tensors
        grad_out = grad_out.clone() if _is_lazy(grad_out) else grad_out
        with without_autocast(grad_out):  # a backward pass may be started under autocast
            if transformed():
                grads = plain(grad_out, *saved[: ctx.inputs])
            elif torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad_out):
                grads = derivative(grad_out, *saved)
            else:
                grads = backward(grad_out, *saved)
        return None, None, None, None, *grads


def _is_lazy(tensor: Tensor) -> bool:
    """Whether the numbers in memory are not the tensor's: it is their negative, as the imaginary part of a conjugate
    is, or zeros that take none."""
    return tensor.is_neg() or tensor._is_zerotensor()
