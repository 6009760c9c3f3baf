"""The convolution path of the ACmix block: the public operation, its checks, and the choice of an implementation."""

from torch import Tensor

from acmix.ops import reference


def shift_conv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fc_weight: Tensor,
    shift_weight: Tensor,
    *,
    fc_bias: Tensor | None = None,
    bias: Tensor | None = None,
    stride: int = 1,
    dilation: int = 1,
    impl: str = "auto",
) -> Tensor:
    """Mix the 3N maps into k² maps, then shift and sum them by one grouped convolution (paper section 4)."""
    return reference.shift_conv(q, k, v, fc_weight, shift_weight, fc_bias, bias, stride, dilation)
