"""The weight of the folded convolution path: both of its steps in one."""

from torch import Tensor

from acmix.ops.maps import without_autocast


def fold(fc_weight: Tensor, shift_weight: Tensor) -> Tensor:
    """Both steps of `shift_conv` as one grouped convolution: its weight (N*d, 3N, k, k), rows (head_dim, head).

    It lies in memory as (3N, k, k, N*d): one product of two matrices makes it.
    """
    kernel = shift_weight.shape[-1]
    with without_autocast(fc_weight):
        folded = fc_weight.t() @ shift_weight.permute(1, 2, 3, 0).flatten(1)
    return folded.unflatten(1, (kernel, kernel, -1)).permute(3, 0, 1, 2)


def empty_like_folded(weight: Tensor) -> Tensor:
    """An uninitialised weight that lies in memory as `fold` gives it."""
    outputs, *others = weight.shape
    return weight.new_empty(*others, outputs).permute(3, 0, 1, 2)
