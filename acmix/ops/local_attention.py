"""Sliding-window attention of the ACmix block: public operation, checks, choice of an implementation."""

from torch import Tensor

from acmix.ops import reference


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_weight: Tensor,
    kernel_size: int,
    stride: int = 1,
    impl: str = "auto",
    *,
    dilation: int = 1,
) -> Tensor:
    """Attend from every stride-th pixel to the K × K window around it (paper section 4, the ResNet version)."""
    _check(q, k, v, position_weight, kernel_size, stride, dilation)
    return reference.local_attention(q, k, v, position_weight, kernel_size, stride, dilation)


def _check(
    q: Tensor, k: Tensor, v: Tensor, position_weight: Tensor, kernel_size: int, stride: int, dilation: int
) -> None:
    if q.dim() != 4 or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(
            f"q, k and v must be maps of one shape (B, heads * head_dim, H, W), got {tuple(q.shape)}, {tuple(k.shape)} "
            f"and {tuple(v.shape)}"
        )
    if position_weight.dim() != 2 or position_weight.shape[1] != 2:
        raise ValueError(f"position_weight must have shape (head_dim, 2), got {tuple(position_weight.shape)}")
    head_dim = position_weight.shape[0]
    if q.shape[1] % head_dim:
        raise ValueError(
            f"{q.shape[1]} channels do not divide into heads of width {head_dim} (the rows of position_weight): "
            f"choose channels = heads * {head_dim}"
        )
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(
            f"kernel_size {kernel_size} has no centre pixel: choose an odd size, such as {max(kernel_size, 0) + 1}"
        )
    if stride < 1 or dilation < 1:
        raise ValueError(f"stride and dilation must be at least 1, got stride {stride} and dilation {dilation}")
    reach = dilation * (kernel_size // 2)
    if min(q.shape[-2:]) <= reach:
        raise ValueError(
            f"a {q.shape[-2]}×{q.shape[-1]} map is too small for kernel_size {kernel_size} with dilation {dilation}: "
            f"reflection padding reaches {reach} pixels and needs a map of at least {reach + 1}×{reach + 1}; use a "
            f"larger input, a smaller kernel_size or less stride before this layer"
        )
