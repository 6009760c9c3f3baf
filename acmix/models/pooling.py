"""Max pooling that is fast on a CPU whatever the memory format."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmix.ops.implementations import transformed


class MaxPool2d(nn.MaxPool2d):
    """PyTorch's max pooling, equal to the last bit in values and gradients.

    On a CPU, PyTorch compares the pixels of an NCHW map one at a time, those of a channels_last map in vectors: there
    and back again takes a quarter of the time, and about half of it with the backward pass.
    """

    def forward(self, x: Tensor) -> Tensor:
        graph = torch.compiler.is_compiling() or torch.jit.is_tracing() or transformed()
        if graph or x.device.type != "cpu" or x.dim() != 4 or not x.is_contiguous():
            return super().forward(x)
        last = x.detach().contiguous(memory_format=torch.channels_last)
        values, places = F.max_pool2d(
            last, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, return_indices=True
        )
        if not x.requires_grad:
            return values.contiguous()
        # the gradient of the choice has a kernel for NCHW maps, that of the pooling would be as slow as what it saves
        return x.flatten(2).gather(2, places.flatten(2)).unflatten(2, places.shape[2:])
