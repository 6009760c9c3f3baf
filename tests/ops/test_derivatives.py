"""Second derivatives, torch.func and forward-mode AD of both operations, against the reference in float64."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacrev, jvp, vmap

from acmix.layers import ACmix
from acmix.ops import local_attention, shift_conv
from acmix.ops.native import cxx_compiler
from acmix.testing import AttentionCase, ShiftConvCase

needs_compiler = pytest.mark.skipif(cxx_compiler() is None, reason="needs a C++ compiler")
CPP = pytest.param("cpp", marks=needs_compiler)
Operation = Callable[..., Tensor]


def attention(impl: str, dtype: torch.dtype = torch.float64, batch: int = 1) -> tuple[Operation, list[Tensor]]:
    """(q, k, v, position weight) to the attended map, and inputs."""
    case = AttentionCase(1, 2, 4, 5, kernel_size=3, stride=2, batch=batch, dtype=dtype)

    def run(*tensors: Tensor) -> Tensor:
        return local_attention(*tensors, case.kernel_size, case.stride, impl)

    return run, case.inputs()[:4]


def convolution(impl: str, dtype: torch.dtype = torch.float64, batch: int = 1) -> tuple[Operation, list[Tensor]]:
    """(q, k, v, both weights, both biases) to the convolved map, and inputs."""
    case = ShiftConvCase(heads=1, head_dim=2, height=3, width=4, stride=2, batch=batch, dtype=dtype)

    def run(*tensors: Tensor) -> Tensor:
        return shift_conv(*tensors[:5], fc_bias=tensors[5], bias=tensors[6], stride=2, impl=impl)

    return run, case.inputs()[:7]


FAST = [
    *(pytest.param(attention, impl, id=f"attention-{impl}") for impl in ("auto", "dense", "tiled")),
    *(pytest.param(convolution, impl, id=f"convolution-{impl}") for impl in ("auto", "folded", "unfolded", "dense")),
    pytest.param(attention, "cpp", marks=needs_compiler, id="attention-cpp"),
    pytest.param(convolution, "cpp", marks=needs_compiler, id="convolution-cpp"),
]
BOTH = pytest.mark.parametrize("operation", [attention, convolution])


@pytest.mark.parametrize(("operation", "impl"), FAST)
def test_every_implementation_passes_gradcheck_and_gradgradcheck(operation, impl):
    run, inputs = operation(impl)
    leaves = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True, check_batched_grad=True)


@BOTH
def test_forward_mode_passes_gradcheck_alone_and_over_reverse_mode(operation):
    run, inputs = operation("auto")
    leaves = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True, check_forward_ad=True, check_batched_forward_grad=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True, check_fwd_over_rev=True)


def test_second_derivatives_see_one_map_given_three_times_as_three():
    run, (q, _, _, weight) = attention("dense")
    reference, _ = attention("reference")
    q.requires_grad_()

    def penalty(op: Operation) -> Tensor:
        (first,) = torch.autograd.grad(op(q, q, 2 * q, weight).square().sum(), q, create_graph=True)
        return torch.autograd.grad(first.square().sum(), q)[0]

    torch.testing.assert_close(penalty(run), penalty(reference))


@BOTH
def test_gradients_of_every_sample_equal_those_of_the_samples_alone(operation):
    run, inputs = operation("auto", batch=3)
    maps, weights = inputs[:3], inputs[3:]

    def loss(weights: tuple[Tensor, ...], *maps: Tensor) -> Tensor:
        return run(*(m[None] for m in maps), *weights).square().sum()

    together = vmap(grad(loss), in_dims=(None, 0, 0, 0))(tuple(weights), *maps)
    for sample in range(3):
        leaves = [w.detach().requires_grad_() for w in weights]
        alone = torch.autograd.grad(loss(tuple(leaves), *(m[sample] for m in maps)), leaves)
        torch.testing.assert_close(tuple(g[sample] for g in together), alone)


@BOTH
def test_vmap_over_maps_over_weights_and_over_both(operation):
    run, inputs = operation("auto", batch=2)
    doubled = [torch.stack([t, 2 * t]) for t in inputs]
    expected = {
        "maps": torch.stack([run(*(f * t for t in inputs[:3]), *inputs[3:]) for f in (1, 2)]),
        "weights": torch.stack([run(*inputs[:3], *(f * t for t in inputs[3:])) for f in (1, 2)]),
        "both": torch.stack([run(*(f * t for t in inputs)) for f in (1, 2)]),
    }
    for mapped, want in expected.items():
        in_dims = tuple(0 if mapped == "both" or (i < 3) == (mapped == "maps") else None for i in range(len(inputs)))
        chosen = [many if dim == 0 else one for one, many, dim in zip(inputs, doubled, in_dims, strict=True)]
        torch.testing.assert_close(vmap(run, in_dims)(*chosen), want)


@BOTH
def test_jvp_and_both_hessians_equal_those_of_the_reference(operation):
    (run, inputs), (reference, _) = operation("auto"), operation("reference")
    tangents = tuple(torch.ones_like(t) for t in inputs)
    torch.testing.assert_close(jvp(run, tuple(inputs), tangents), jvp(reference, tuple(inputs), tangents))

    def loss(op: Operation, weight: Tensor) -> Tensor:
        return op(*inputs[:3], weight, *inputs[4:]).square().sum()

    want = jacrev(grad(lambda w: loss(reference, w)))(inputs[3])
    torch.testing.assert_close(hessian(lambda w: loss(run, w))(inputs[3]), want)
    for vectorize in (False, True):
        got = torch.autograd.functional.hessian(lambda w: loss(run, w), inputs[3], vectorize=vectorize)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("impl", ["dense", "tiled", CPP])
def test_an_implementation_asked_for_by_name_refuses_a_transform_and_names_the_reference(impl):
    run, inputs = attention(impl)
    with pytest.raises(ValueError, match=rf"impl '{impl}' cannot run local_attention .*impl='reference'"):
        vmap(run)(*(t[None] for t in inputs))
    with forward_ad.dual_level(), pytest.raises(ValueError, match="impl='reference'"):
        run(forward_ad.make_dual(inputs[0], inputs[0]), *inputs[1:])


def test_a_custom_operation_in_a_graph_is_never_taken_for_a_constant_by_forward_mode():
    _, inputs = attention("auto")
    with pytest.raises(RuntimeError, match=r"local_attention in a compiled or exported graph.*impl='reference'"):
        jvp(lambda q: torch.ops.acmix.local_attention(q, *inputs[1:], 3, 1, 1, "dense")[0], (inputs[0],), (inputs[0],))


def test_second_derivatives_under_autocast_are_those_of_the_low_precision_maps():
    run, inputs = attention("dense", torch.float32)
    leaves = [t.requires_grad_() for t in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        first = torch.autograd.grad(run(*leaves).float().square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    assert all(g.dtype == torch.float32 and g.isfinite().all() and g.any() for g in second)


def test_debug_says_when_the_reference_steps_in():
    program = (
        "import torch; from acmix.ops import local_attention as f; w = torch.zeros(4, 2)\n"
        "x = torch.randn(1, 8, 9, 9).requires_grad_()\n"
        "g, = torch.autograd.grad(f(x, x, x, w, 5).sum(), x, create_graph=True); g.sum().backward()\n"
        "torch.func.vmap(lambda x: f(x, x, x, w, 5))(x[None])"
    )
    environment = {"ACMIX_DEBUG": "1", "ACMIX_COMPILE": "never", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    first, second, mapped = (line for line in run.stderr.splitlines() if line.startswith("acmix:"))
    assert ": dense (" in first
    assert second == "acmix: local_attention: reference, for a derivative that the other implementations lack"
    assert ": reference (" in mapped
    assert "dense: it lacks the rules of torch.func" in mapped


def test_a_block_takes_many_gradients_at_once_and_second_derivatives():
    """Both of its paths are one operation."""
    torch.manual_seed(0)
    block = ACmix(8, 8, heads=2, kernel_att=3).double()
    x = torch.randn(1, 8, 4, 5, dtype=torch.float64, requires_grad=True)
    out = block(x)
    gradients = torch.randn(3, *out.shape, dtype=torch.float64)
    leaves = [x, *block.parameters()]
    together = torch.autograd.grad(out, leaves, gradients, is_grads_batched=True, retain_graph=True)
    for i, gradient in enumerate(gradients):
        alone = torch.autograd.grad(out, leaves, gradient, retain_graph=True)
        for many, one in zip(together, alone, strict=True):
            torch.testing.assert_close(many[i], one)
    assert torch.autograd.gradgradcheck(block, (x,), fast_mode=True)
