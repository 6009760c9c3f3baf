"""Derivatives that no implementation has, taken through plain PyTorch.

An implementation has a forward and a backward pass. The derivative of its backward pass, and its backward pass inside a
transform of torch.func, are those of a function in plain PyTorch that computes the same.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import CustomOpDef

from acmix.ops.implementations import announcing, print_once
from acmix.ops.maps import without_autocast

# Four tensors and the options to the operation's output.
Plain = Callable[..., Tensor]


def plain_gradients(
    name: str, plain: Plain, inputs: Sequence[Tensor], options: Sequence[int], grad_out: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of `plain(*inputs, *options)` for every input: themselves differentiable, under any transform.

    Args:
        name: Of the operation, for the announcement.
    """
    if announcing():
        print_once(f"acmix: {name}: reference, for a derivative that the other implementations lack")

    def call(*tensors: Tensor) -> Tensor:
        return plain(*tensors, *options)

    with without_autocast(grad_out):  # a backward pass may be started under autocast
        return torch.func.vjp(call, *inputs)[1](grad_out)


def register_second_derivative(name: str, backward: CustomOpDef, plain: Plain, options: int, idle: int = 1) -> None:
    """Let autograd differentiate an operation's backward pass: (grad_out, four inputs, ..., *options, *idle ones).

    Args:
        name: Of the operation.
        backward: The custom operation that computes its gradients.
        plain: The operation in plain PyTorch, for the four inputs and the options.
        options: How many there are.
        idle: How many arguments at the end change no number.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:5])
        end = len(inputs) - idle
        ctx.options = inputs[end - options : end]
        ctx.others = (None,) * (len(inputs) - 5)

    def derivative(ctx: Any, *grad_grads: Tensor) -> tuple[Tensor | None, ...]:
        def gradients(grad_out: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            return plain_gradients(name, plain, inputs, ctx.options, grad_out)

        return *torch.func.vjp(gradients, *ctx.saved_tensors)[1](grad_grads), *ctx.others

    backward.register_autograd(derivative, setup_context=setup_context)


def refuse_forward_ad(name: str) -> None:
    """Raise RuntimeError where forward-mode AD is on: it would silently take a custom operation for a constant."""
    if forward_ad._current_level >= 0:
        raise RuntimeError(f"{name} in a compiled or exported graph has no forward derivative; use impl='reference'")
