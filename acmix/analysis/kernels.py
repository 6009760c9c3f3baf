"""How far the learned shift kernels have moved."""

import torch
from torch import Tensor

from acmix.layers.convolution import ShiftConv, one_hot_shifts


def shift_distance(path: ShiftConv | None) -> Tensor | None:
    """‖W - W₀‖ / ‖W₀‖ of the shift kernels W and the one-hot shifts W₀ they start from (paper section 3.2): a scalar.

    At least 0: 0 is a pure shift, 1 a change as large as the shifts themselves. Frobenius norms. None for kernels that
    are not trained, or from another start than the shifts.
    """
    if path is None or path.kind != "learned":
        return None
    start = one_hot_shifts(1, path.kernel_size).to(path.shift_weight)  # the same for every channel
    moved = torch.linalg.vector_norm((path.shift_weight.detach() - start).double())
    return moved / len(path.shift_weight) ** 0.5 / path.kernel_size
