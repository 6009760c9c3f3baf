"""The weight of the folded convolution path: both of its steps in one."""

import torch
from torch import Tensor

from acmix.ops import eager
from acmix.ops.implementations import transformed
from acmix.ops.maps import without_autocast


def fold(fc_weight: Tensor, shift_weight: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """scale · both steps of `shift_conv` as one grouped convolution: its weight (N*d, 3N, k, k), rows (head_dim, head).

    It lies in memory as (3N, k, k, N*d): one product of two matrices makes it. `scale` is a number or a scalar tensor.
    In eager mode all of it is one node of the graph: at this size autograd's own nodes take longer than the products.
    """
    inputs = (fc_weight, shift_weight, scale) if isinstance(scale, Tensor) else (fc_weight, shift_weight)
    number = () if isinstance(scale, Tensor) else (scale,)
    with without_autocast(fc_weight):
        if not torch.is_grad_enabled() or transformed() or not eager.is_eager(*inputs):
            return _fold(fc_weight, shift_weight, scale)[0]
        return eager.call(
            lambda *tensors: _fold(*tensors, *number),
            lambda grad, *tensors: _gradients(grad, tensors[-1], *tensors[:-1], *number)[: len(inputs)],
            lambda grad, *tensors: _gradients(grad, _columns(tensors[1]), *tensors[:-1], *number)[: len(inputs)],
            lambda grad, *tensors: _gradients(grad, _columns(tensors[1]), *tensors, *number)[: len(inputs)],
            *inputs,
        )


def empty_like_folded(weight: Tensor) -> Tensor:
    """An uninitialised weight that lies in memory as `fold` gives it."""
    outputs, *others = weight.shape
    return weight.new_empty(*others, outputs).permute(3, 0, 1, 2)


def _fold(fc_weight: Tensor, shift_weight: Tensor, scale: Tensor | float) -> tuple[Tensor, Tensor]:
    """The folded weight, and the kernels as columns of a matrix, which its gradients need."""
    columns = _columns(shift_weight)
    return _kernels((scale * fc_weight).t() @ columns, shift_weight.shape[-1]), columns


def _gradients(
    grad: Tensor, columns: Tensor, fc_weight: Tensor, shift_weight: Tensor, scale: Tensor | float
) -> tuple[Tensor, ...]:
    """Those of fc_weight, shift_weight and, where it is a tensor, scale."""
    products = _columns(grad)
    shifts = _kernels((scale * fc_weight) @ products, shift_weight.shape[-1])
    scaled = columns @ products.t()
    if not isinstance(scale, Tensor):
        return scale * scaled, shifts
    return scale * scaled, shifts, (fc_weight * scaled).sum()


def _columns(kernels: Tensor) -> Tensor:
    """(N*d, M, k, k) as a matrix (M, k * k * N*d)."""
    return kernels.permute(1, 2, 3, 0).reshape(kernels.shape[1], -1)


def _kernels(columns: Tensor, size: int) -> Tensor:
    """The inverse of `_columns`, for kernels of this size; no copy."""
    return columns.view(len(columns), size, size, -1).permute(3, 0, 1, 2)
