"""The convolution path of the ACmix block: public operation, checks, registration with torch.library."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from acmix.ops import eager, reference
from acmix.ops.derivatives import plain_gradients, refuse_forward_ad, register_second_derivative
from acmix.ops.implementations import ALIASES, Problem, Window, announcing, transformed
from acmix.ops.maps import (
    are_dynamic,
    are_uneven,
    autocast_dtype,
    cast_maps,
    check_contents,
    check_device,
    empty_like_layout,
    is_channels_last,
    keepable,
    without_autocast,
)
from acmix.ops.opaque import convolve
from acmix.ops.shift_conv.implementations import SHIFT_CONV
from acmix.ops.shift_conv.weight import empty_like_folded, fold


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
    """Mix the 3N maps into k² maps, then shift and sum them by one grouped convolution (paper section 4).

    The fully connected layer and the convolution are both linear, so they fold into one grouped convolution with weight
    W[(c, n), m] = sum_i shift_weight[(c, n), i] * fc_weight[i, m]: the k² maps of width d never exist. Folding
    happens at every call, and both parameters are trained.

    Args:
        q, k, v: Maps (B, N*d, H, W), channels (head, head_dim), any strides. They may have other numbers of heads, of
            one width d; read M, the maps of all three, for 3N then.
        fc_weight: (k², 3N): the layer over the map index, maps in the order q, k, v, heads within.
        shift_weight: (N*d, k², k, k): the grouped convolution, rows (head_dim, head), d groups.
        fc_bias: (k²,) or None; it passes through the zero-padded shift, so it is no constant near the border.
        bias: (N*d,) or None.
        stride, dilation: Of the grouped convolution; its padding is dilation * (k // 2), zeros.
        impl: `auto`, or one of `unfolded` (two steps, fewer products from 5 heads on), `cpp`
            (folded, in C++, on a CPU), `triton` (folded, on a GPU), `folded` (grouped convolution), `dense` (folded,
            zeros between the groups), `reference` (two steps): that one runs or the call fails. The former name
            `compiled` for `cpp` still works.

    Returns:
        (B, N*d, ceil(H / stride), ceil(W / stride)), channels (head_dim, head): the authors' order, which is added
        to the attention's (head, head_dim) as it is.

    Raises:
        ValueError: for shapes that do not fit together, an even k, an unknown impl, or an impl that cannot run here.
    """
    if (dtype := autocast_dtype(q)) is not None:
        q, k, v = cast_maps(dtype, q, k, v)
        with without_autocast(q):
            return shift_conv(
                q, k, v, fc_weight, shift_weight,
                fc_bias=fc_bias, bias=bias, stride=stride, dilation=dilation, impl=impl,
            )  # fmt: skip
    window = _window(shift_weight.shape[-1], stride, dilation, q)
    _check(q, k, v, fc_weight, shift_weight, fc_bias, bias)
    choice = SHIFT_CONV.resolve(impl, _problem(q, k, v, fc_weight.shape[1], window))
    if choice in ("reference", "unfolded"):
        fc_weight, shift_weight = fc_weight.to(q.dtype), shift_weight.to(q.dtype)
        fc_bias, bias = (None if b is None else b.to(q.dtype) for b in (fc_bias, bias))
        two_steps = reference.shift_conv if choice == "reference" else _unfolded
        return two_steps(q, k, v, fc_weight, shift_weight, fc_bias, bias, window.stride, dilation)
    out = _convolve(q, k, v, fold(fc_weight, shift_weight), window, choice)
    if fc_bias is not None:
        out = out + _bias_map(fc_bias, shift_weight, q, window).to(q.dtype)
    return out if bias is None else out + bias.to(q.dtype)[:, None, None]


def grouped_conv(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, *, stride: int = 1, dilation: int = 1, impl: str = "auto"
) -> Tensor:
    """What `shift_conv` folds into: one grouped convolution from the 3N maps to N, with a kernel of its own each.

    Args:
        q, k, v: Maps as for `shift_conv`, any strides.
        weight: (N*d, 3N, k, k): rows (head_dim, head), d groups; columns in the order q, k, v, heads within.
        stride, dilation: Of the convolution; its padding is dilation * (k // 2), zeros.
        impl: As for `shift_conv`; `unfolded` and `reference`, which have nothing to fold, are PyTorch's convolution.

    Returns:
        (B, N*d, ceil(H / stride), ceil(W / stride)), channels (head_dim, head).

    Raises:
        ValueError: for shapes that do not fit together, an even k, an unknown impl, or an impl that cannot run here.
    """
    if (dtype := autocast_dtype(q)) is not None:
        q, k, v = cast_maps(dtype, q, k, v)
        with without_autocast(q):
            return grouped_conv(q, k, v, weight, stride=stride, dilation=dilation, impl=impl)
    _check_folded(q, k, v, weight)
    window = _window(weight.shape[-1], stride, dilation, q)
    choice = SHIFT_CONV.resolve(impl, _problem(q, k, v, weight.shape[1], window))
    if choice in ("reference", "unfolded"):
        return convolve_plain(q, k, v, weight.to(q.dtype), window.stride, dilation)
    return _convolve(q, k, v, weight, window, choice)


def _window(kernel_size: int, stride: int, dilation: int, maps: Tensor) -> Window:
    """The window of a convolution of maps like these.

    On a single pixel every stride gives the same. There the weight's gradient of a strided convolution in bf16 is
    memory that oneDNN never wrote (PyTorch 2.14): it is computed with stride 1.
    """
    window = Window(kernel_size, stride, dilation)
    is_affected = maps.dtype == torch.bfloat16 and maps.device.type == "cpu" and not are_dynamic(maps.shape[2:])
    return replace(window, stride=1) if is_affected and maps.shape[2:].numel() == 1 else window


def _problem(q: Tensor, k: Tensor, v: Tensor, maps: int, window: Window) -> Problem:
    uneven = are_uneven(q, k, v)
    heads = q.shape[1] // _width(q, k, v, maps) if uneven else maps // 3
    return replace(Problem.of(q, heads, window), uneven=uneven)


def _width(q: Tensor, k: Tensor, v: Tensor, maps: int) -> int:
    """d, where q, k and v hold this many maps together."""
    return (q.shape[1] + k.shape[1] + v.shape[1]) // maps


def _convolve(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, window: Window, impl: str) -> Tensor:
    """The folded convolution itself: maps (B, N*d, H, W), weight (N*d, 3N, k, k), rows (head_dim, head), d groups."""
    if impl == "triton":  # it multiplies in float32 anyway
        return _run(q, k, v, weight, window, impl)
    weight = weight.to(q.dtype)
    if impl == "dense":
        return _convolve_dense(q, k, v, weight, window)
    if impl == "folded" and is_channels_last(v):
        head_dim = _width(q, k, v, weight.shape[1])
        maps = _as_map(_side_by_side(q, k, v, head_dim))
        return F.conv2d(maps, weight, None, window.stride, window.reach, window.dilation, head_dim)
    if q.device.type != "cpu" or are_uneven(q, k, v):
        return convolve_plain(q, k, v, weight, window.stride, window.dilation)
    return _run(q, k, v, weight, window, impl)


def _run(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, window: Window, impl: str) -> Tensor:
    """An implementation in a module of its own."""
    inputs, options = (q, k, v, weight), (window.stride, window.dilation, impl)
    if not eager.is_eager(*inputs):
        out: Tensor = _forward(*inputs, *options)
        return out
    kernels = SHIFT_CONV.load(impl)
    return eager.call(
        lambda *tensors: (kernels.forward(*tensors, window),),
        lambda *tensors: kernels.backward(*tensors, window),
        lambda *tensors: _backward(*tensors, *options),
        lambda grad, *tensors: plain_gradients("shift_conv", convolve_plain, tensors, options[:-1], grad),
        *inputs,
    )


def convolve_plain(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
    """The folded convolution over one reordered copy of q, k and v."""
    head_dim = _width(q, k, v, weight.shape[1])
    maps = torch.cat([_in_heads(m, head_dim) for m in (q, k, v)], 1).transpose(1, 2).flatten(1, 2)
    padding = dilation * (weight.shape[-1] // 2)
    return F.conv2d(maps, weight, None, stride, padding, dilation, head_dim)


def _unfolded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fc_weight: Tensor,
    shift_weight: Tensor,
    fc_bias: Tensor | None,
    bias: Tensor | None,
    stride: int,
    dilation: int,
) -> Tensor:
    """Both steps, the maps of a channel side by side: the first is one matrix product; the result is channels_last."""
    maps = _side_by_side(q, k, v, _width(q, k, v, fc_weight.shape[1]))
    (mixed,) = keepable(_as_map(F.linear(maps, fc_weight, fc_bias)))
    padding = dilation * (shift_weight.shape[-1] // 2)
    return convolve(mixed, shift_weight, bias, stride, padding, dilation, maps.shape[3])


def _side_by_side(q: Tensor, k: Tensor, v: Tensor, head_dim: int) -> Tensor:
    """The 3N maps of each channel next to each other: (B, H, W, d, 3N), in one pass."""
    return torch.cat([_in_heads(m, head_dim).permute(0, 3, 4, 2, 1) for m in (q, k, v)], 4)


def _in_heads(maps: Tensor, head_dim: int) -> Tensor:
    """(B, N*d, H, W) as (B, N, d, H, W), also where N is 0."""
    return maps.unflatten(1, (maps.shape[1] // head_dim, head_dim))


def _as_map(side_by_side: Tensor) -> Tensor:
    """(B, H, W, d, M) as a channels_last map (B, d*M, H, W), without a copy."""
    return side_by_side.flatten(3).permute(0, 3, 1, 2)


def _convolve_dense(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, window: Window) -> Tensor:
    """One ungrouped convolution, zeros between the groups: d times the products, but no reordering of the maps."""
    heads = weight.shape[1] // 3
    head_dim = weight.shape[0] // heads
    same_group = torch.eye(head_dim, dtype=weight.dtype, device=weight.device)
    # (d, N) outputs by (q/k/v and head, d) inputs
    spread = torch.einsum("cnmyx,ce->cnmeyx", weight.unflatten(0, (head_dim, heads)), same_group)
    dense = spread.flatten(2, 3).flatten(0, 1)
    return F.conv2d(torch.cat([q, k, v], 1), dense, None, window.stride, window.reach, window.dilation)


def _bias_map(fc_bias: Tensor, shift_weight: Tensor, like: Tensor, window: Window) -> Tensor:
    """What the fully connected layer's bias adds to each position: (N*d, Ho, Wo), from the taps that lie in the map.

    In float64 where the device has it: the bias's gradient is a sum over all channels and positions that may cancel.
    """
    if like.device.type != "mps":
        fc_bias, shift_weight = fc_bias.double(), shift_weight.double()
    taps = torch.einsum("oiyx,i->oyx", shift_weight, fc_bias)
    rows, columns = (_inside(size, taps, window) for size in like.shape[-2:])
    return rows.T @ (taps @ columns)


def _inside(size: int, taps: Tensor, window: Window) -> Tensor:
    """1 where a tap (rows) at an output position (columns) meets the map and not its padding, along one axis."""
    tap = torch.arange(window.kernel_size, device=taps.device) * window.dilation - window.reach
    place = torch.arange(0, size, window.stride, device=taps.device) + tap[:, None]
    return ((place >= 0) & (place < size)).to(taps.dtype)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fc_weight: Tensor,
    shift_weight: Tensor,
    fc_bias: Tensor | None,
    bias: Tensor | None,
) -> None:
    uneven, kernel = are_uneven(q, k, v), shift_weight.shape[-1]
    check_contents(q, k, v)
    check_device(q, k, v, fc_weight, shift_weight, fc_bias, bias)
    channels = shift_weight.shape[0] if uneven else q.shape[1]
    taps = kernel * kernel
    if tuple(shift_weight.shape) != (channels, taps, kernel, kernel):
        raise ValueError(
            f"shift_weight must be (channels, k², k, k) = {(channels, taps, kernel, kernel)} for {channels} channels "
            f"and k = {kernel}, got {tuple(shift_weight.shape)}"
        )
    if fc_weight.dim() != 2 or fc_weight.shape[0] != taps or (fc_weight.shape[1] % 3 and not uneven):
        raise ValueError(f"fc_weight must be (k², 3 * heads) = ({taps}, 3 * heads), got {tuple(fc_weight.shape)}")
    heads = fc_weight.shape[1] // 3
    if uneven:
        _check_uneven(q, k, v, fc_weight.shape[1], channels)
    elif heads == 0 or channels == 0 or channels % heads:
        raise ValueError(f"{channels} channels do not divide into {heads} heads (fc_weight's columns / 3)")
    if fc_bias is not None and tuple(fc_bias.shape) != (taps,):
        raise ValueError(f"fc_bias must be (k²,) = ({taps},), got {tuple(fc_bias.shape)}")
    if bias is not None and tuple(bias.shape) != (channels,):
        raise ValueError(f"bias must be (channels,) = ({channels},), got {tuple(bias.shape)}")


def _check_folded(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> None:
    uneven = are_uneven(q, k, v)
    check_contents(q, k, v)
    check_device(q, k, v, weight)
    sizes = tuple(weight.shape)
    fits = len(sizes) == 4 and sizes[2] == sizes[3]
    if fits and uneven:
        _check_uneven(q, k, v, sizes[1], sizes[0])
    elif not fits or not sizes[0] == q.shape[1] > 0 or sizes[1] % 3 or not sizes[1] or q.shape[1] % (sizes[1] // 3):
        raise ValueError(f"weight must be (channels, 3 * heads, k, k), got {sizes} for {q.shape[1]} channels")


def _check_uneven(q: Tensor, k: Tensor, v: Tensor, maps: int, outputs: int) -> None:
    """Raise ValueError unless q, k and v divide into this many maps of one width, and so does the output."""
    widths = [m.shape[1] for m in (q, k, v)]
    if maps == 0 or sum(widths) % maps or any(width % (sum(widths) // maps) for width in (*widths, outputs)):
        raise ValueError(
            f"q, k and v of {widths[0]}, {widths[1]} and {widths[2]} channels and an output of {outputs} do not divide "
            f"into maps of one width, {maps} of them in q, k and v (the weight's columns)"
        )


def _empty_like(maps: Tensor, channels: int, height: int, width: int, impl: str) -> Tensor:
    """A map of so many channels in the layout that `impl` gives to what it makes of `maps`."""
    if impl == "triton":
        return maps.new_empty(maps.shape[0], height, width, channels).permute(0, 3, 1, 2)
    if ALIASES.get(impl, impl) == "cpp":
        return empty_like_layout(maps, height, width)
    return maps.new_empty(maps.shape[0], channels, height, width)


@torch.library.custom_op("acmix::grouped_conv", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, stride: int, dilation: int, impl: str) -> Tensor:
    """Grouped convolution over the maps of q, k and v, without a reordered copy of them all."""
    refuse_forward_ad("grouped_conv")
    window = Window(weight.shape[-1], stride, dilation)
    if announcing():  # a compiled graph does not come through `resolve`
        SHIFT_CONV.announce(impl, _problem(q, k, v, weight.shape[1], window))
    return SHIFT_CONV.load(impl).forward(q, k, v, weight, window)


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, stride: int, dilation: int, impl: str) -> Tensor:
    height, width = Window(weight.shape[-1], stride, dilation).out_size(*q.shape[2:])
    return _empty_like(q, weight.shape[0], height, width, impl)


@torch.library.custom_op("acmix::grouped_conv_backward", mutates_args=())
def _backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, stride: int, dilation: int, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the weight."""
    window = Window(weight.shape[-1], stride, dilation)
    with without_autocast(q):  # a backward pass may be started under autocast
        return SHIFT_CONV.load(impl).backward(grad_out, q, k, v, weight, window)


@_backward.register_fake
def _(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, stride: int, dilation: int, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (_empty_like(q, m.shape[1], m.shape[2], m.shape[3], impl) for m in (q, k, v))
    is_folded = ALIASES.get(impl, impl) in ("cpp", "triton")
    dweight = empty_like_folded(weight) if is_folded else weight.new_empty(weight.shape)
    return dq, dk, dv, dweight


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*keepable(*inputs[:3]), inputs[3])
    ctx.options = inputs[4:]


def _autograd_backward(ctx, grad_out: Tensor):  # type: ignore[no-untyped-def]
    if transformed():
        grads = plain_gradients("shift_conv", convolve_plain, ctx.saved_tensors, ctx.options[:-1], grad_out)
    else:
        grads = _backward(grad_out, *ctx.saved_tensors, *ctx.options)
    return *grads, None, None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
register_second_derivative("shift_conv", _backward, convolve_plain, options=2)
