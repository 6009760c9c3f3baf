"""Sliding-window attention of the ACmix block: public operation, checks, registration with torch.library."""

import torch
from torch import Tensor

from acmix.ops import eager, reference
from acmix.ops.derivatives import plain_gradients, refuse_forward_ad, register_second_derivative
from acmix.ops.implementations import ALIASES, Problem, Window, announcing, transformed
from acmix.ops.local_attention.implementations import LOCAL_ATTENTION
from acmix.ops.maps import (
    autocast_dtype,
    cast_maps,
    check_contents,
    check_device,
    check_maps,
    empty_like_layout,
    keepable,
    without_autocast,
)


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
    """Attend from every stride-th pixel to the K × K window around it (paper section 4, the ResNet version).

    With head width d and positions p(y, x) = (linspace(-1, 1, W)[x], linspace(-1, 1, H)[y]) on the full map,

        logits[i, j] = d**-0.5 * q_i · (k_j + P (p_i - p_j)),   out_i = sum_j softmax_j(logits[i, j]) v_j

    over the K × K window of i, whose members are `dilation` pixels apart; k, v and p are reflected at the border. On a
    map whose shorter side is not larger than dilation * (K // 2), K is the largest odd number for which it is: a single
    pixel attends to itself.

    Args:
        q, k, v: Maps (B, N*d, H, W), channels (head, head_dim), any strides, one dtype.
        position_weight: P, (d, 2); its rows give d, and with it the number of heads N.
        kernel_size: K, odd.
        stride: Queries are q[:, :, ::stride, ::stride].
        impl: `auto`, or one of `triton`, `dense`, `cpp`, `tiled`, `reference`: that one runs or the call fails. The
            former names `compiled` for `cpp` and `halo` for `tiled` still work.
        dilation: Spacing of the window's members in pixels.

    Returns:
        (B, N*d, ceil(H / stride), ceil(W / stride)), channels (head, head_dim). Under autocast the maps are cast to its
        dtype first, as for a matrix product; positions and the softmax stay in float32 or better.

    Raises:
        ValueError: for maps of different shapes, dtypes or devices, empty maps, channels that d does not divide, an
            even kernel_size, an unknown impl, or an impl that cannot run here (with the reason).
    """
    if (dtype := autocast_dtype(q)) is not None:
        q, k, v = cast_maps(dtype, q, k, v)
        with without_autocast(q):
            return local_attention(q, k, v, position_weight, kernel_size, stride, impl, dilation=dilation)
    _check(q, k, v, position_weight)
    window = Window(kernel_size, stride, dilation).on(*q.shape[2:])
    choice = LOCAL_ATTENTION.resolve(impl, Problem.of(q, q.shape[1] // position_weight.shape[0], window))
    if choice == "reference":
        return reference.local_attention(q, k, v, position_weight, kernel_size, stride, dilation)
    inputs, options = (q, k, v, position_weight), (kernel_size, stride, dilation, choice)
    if not eager.is_eager(*inputs):
        out: Tensor = _forward(*inputs, *options)[0]
        return out
    kernels = LOCAL_ATTENTION.load(choice)

    def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
        result = kernels.forward(*tensors, window)
        return _kept(choice, *result) if _keeps_lse(choice) else (result,)

    return eager.call(
        forward,
        lambda *tensors: kernels.backward(*tensors, window),
        lambda grad, *tensors: _backward(grad, *tensors[:4], *_saved(choice, *tensors[4:]), *options),
        lambda grad, *tensors: plain_gradients(
            "local_attention", reference.local_attention, tensors, options[:-1], grad
        ),
        *inputs,
    )


def _kept(impl: str, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    """The output, and what the backward pass of an implementation needs."""
    return (out, out, lse) if impl == "triton" else (out, lse)


def _saved(impl: str, *kept: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Output and log-sum-exp as `_backward` takes them, each only where the implementation needs it."""
    out = kept[0] if impl == "triton" else None
    return out, kept[-1] if _keeps_lse(impl) else None


def _check(q: Tensor, k: Tensor, v: Tensor, position_weight: Tensor) -> None:
    check_maps(q, k, v)
    check_contents(q, k, v)
    check_device(q, k, v, position_weight)
    if position_weight.dim() != 2 or position_weight.shape[1] != 2 or position_weight.shape[0] < 1:
        raise ValueError(f"position_weight must have shape (head_dim, 2), got {tuple(position_weight.shape)}")
    head_dim = position_weight.shape[0]
    if q.shape[1] % head_dim or not q.shape[1]:
        raise ValueError(
            f"{q.shape[1]} channels do not divide into heads of width {head_dim} (the rows of position_weight): "
            f"choose channels = heads * {head_dim}"
        )


@torch.library.custom_op("acmix::local_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_weight: Tensor,
    kernel_size: int,
    stride: int,
    dilation: int,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """The attended map, and the log-sum-exp of the logits where the implementation's backward pass needs it."""
    refuse_forward_ad("local_attention")
    window = Window(kernel_size, stride, dilation).on(*q.shape[2:])
    if announcing():  # a compiled graph does not come through `resolve`
        LOCAL_ATTENTION.announce(impl, Problem.of(q, q.shape[1] // position_weight.shape[0], window))
    result = LOCAL_ATTENTION.load(impl).forward(q, k, v, position_weight, window)
    return result if _keeps_lse(impl) else (result, q.new_empty(0, dtype=torch.float32))


def _keeps_lse(impl: str) -> bool:
    """Whether an implementation's backward pass needs the log-sum-exp; its results have the layout of q."""
    return ALIASES.get(impl, impl) in ("triton", "cpp")


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_weight: Tensor,
    kernel_size: int,
    stride: int,
    dilation: int,
    impl: str,
) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = q.shape
    size = Window(kernel_size, stride, dilation).out_size(height, width)
    if not _keeps_lse(impl):
        return q.new_empty(batch, channels, *size), q.new_empty(0, dtype=torch.float32)
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_empty(batch, channels // position_weight.shape[0], *size, dtype=wide)
    return empty_like_layout(q, *size), lse


@torch.library.custom_op("acmix::local_attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_weight: Tensor,
    out: Tensor | None,
    lse: Tensor | None,
    kernel_size: int,
    stride: int,
    dilation: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the position weight; logits are computed again."""
    saved = [tensor for tensor in (out, lse) if tensor is not None]
    window = Window(kernel_size, stride, dilation).on(*q.shape[2:])
    with without_autocast(q):  # a backward pass may be started under autocast
        return LOCAL_ATTENTION.load(impl).backward(grad_out, q, k, v, position_weight, *saved, window)


@_backward.register_fake
def _(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_weight: Tensor,
    out: Tensor | None,
    lse: Tensor | None,
    kernel_size: int,
    stride: int,
    dilation: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = [empty_like_layout(m, *m.shape[-2:]) if _keeps_lse(impl) else m.new_empty(m.shape) for m in (q, k, v)]
    return grads[0], grads[1], grads[2], torch.empty_like(position_weight, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, position_weight, kernel_size, stride, dilation, impl = inputs
    ctx.set_materialize_grads(False)  # or zeros are made for the second output
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*keepable(q, k, v), position_weight, *_saved(impl, *output))
    ctx.options = (kernel_size, stride, dilation, impl)


def _autograd_backward(ctx, grad_out: Tensor | None, _: None):  # type: ignore[no-untyped-def]
    if grad_out is None:
        return (None,) * 8
    if transformed():
        inputs, options = ctx.saved_tensors[:4], ctx.options[:-1]
        grads = plain_gradients("local_attention", reference.local_attention, inputs, options, grad_out)
    else:
        grads = _backward(grad_out, *ctx.saved_tensors, *ctx.options)
    return *grads, None, None, None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
register_second_derivative("local_attention", _backward, reference.local_attention, options=3)
