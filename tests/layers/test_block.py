"""The block against the authors' tensors, and its arms, shapes, dtypes and refusals."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from acmix import ACmix
from acmix.layers import LocalAttention, PatchwiseAttention, ReducedAttention, WindowAttention
from acmix.models import load_official
from acmix.ops.local_attention.implementations import LOCAL_ATTENTION

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
# Not timed here: `cpp` waits for a compiler, `triton` runs in its interpreter; their own tests hold them to the
# reference.
EAGER = [impl for impl in LOCAL_ATTENTION.names if impl not in ("cpp", "triton")]
LIMIT = 1e-6  # float64 leaves ten orders of magnitude below it; a wrong formula does not


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).detach().norm() / want.detach().norm())


def official_gradients(block: ACmix) -> dict[str, Tensor]:
    """Our gradients under the authors' names, in their shapes."""
    qkv_weight = block.qkv.weight.grad[:, :, None, None].chunk(3)
    qkv_bias = block.qkv.bias.grad.chunk(3)
    named = {f"conv{i + 1}.weight": part for i, part in enumerate(qkv_weight)}
    named |= {f"conv{i + 1}.bias": part for i, part in enumerate(qkv_bias)}
    return named | {
        "conv_p.weight": block.attention.position_weight.grad[:, :, None, None],
        "fc.weight": block.convolution.fc_weight.grad[:, :, None, None],
        "dep_conv.weight": block.convolution.shift_weight.grad,
        "rate1": block.mix.alpha.grad[None],
        "rate2": block.mix.beta.grad[None],
    }


@pytest.mark.parametrize("impl", ["auto", *EAGER])
@pytest.mark.parametrize("name", ["block_a", "block_b"])
def test_block_and_every_gradient_match_the_authors(name, impl):
    golden = np.load(GOLDEN / f"{name}.npz")
    tensors = {key: torch.from_numpy(golden[key]) for key in golden.files if key != "config"}
    block = ACmix(**json.loads(str(golden["config"])), impl=impl).double()
    load_official(block, {key[6:]: value for key, value in tensors.items() if key.startswith("param/")})
    x = tensors["x"].requires_grad_()
    y = block(x)
    assert relative(y, tensors["y"]) < LIMIT
    y.backward(tensors["grad_y"])
    assert relative(x.grad, tensors["grad_x"]) < LIMIT
    for key, gradient in official_gradients(block).items():
        assert relative(gradient, tensors[f"grad/{key}"]) < LIMIT, key


@pytest.mark.parametrize("mix", ["attention", "convolution", "sum", "convex", "learned"])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_block_is_the_mix_of_its_paths(mix, stride):
    torch.manual_seed(0)
    block = ACmix(6, 8, heads=2, kernel_att=5, stride=stride, mix=mix).double()
    x = torch.randn(2, 6, 7, 9, dtype=torch.float64)
    q, k, v = torch.nn.functional.conv2d(x, block.qkv.weight[:, :, None, None], block.qkv.bias).chunk(3, 1)
    zero = torch.zeros(())
    attention = zero if block.attention is None else block.attention(q, k, v)
    convolution = zero if block.convolution is None else block.convolution(q, k, v)
    out = block(x)
    assert out.shape == (2, 8, -(-7 // stride), -(-9 // stride))
    torch.testing.assert_close(out, block.mix(attention, convolution))


def test_an_arm_that_leaves_a_path_out_has_no_parameters_for_it():
    names = {mix: " ".join(ACmix(8, 8, mix=mix).state_dict()) for mix in ("attention", "convolution")}
    assert "convolution." not in names["attention"]
    assert "attention." not in names["convolution"]


def test_every_parameter_gets_a_gradient_in_every_arm():
    for mix in ("attention", "convolution", "sum", "convex", "learned"):
        block = ACmix(8, 8, heads=2, kernel_att=3, mix=mix)
        block(torch.randn(2, 8, 6, 5)).square().sum().backward()
        assert all(parameter.grad is not None for parameter in block.parameters()), mix


def test_the_state_dict_is_the_same_whatever_the_implementation():
    want = {key: value.shape for key, value in ACmix(8, 8).state_dict().items()}
    for impl in LOCAL_ATTENTION.names:
        assert {key: value.shape for key, value in ACmix(8, 8, impl=impl).state_dict().items()} == want


def test_channels_last_maps_give_the_same_result():
    torch.manual_seed(0)
    block = ACmix(8, 16, heads=4, kernel_att=3, dilation=2).double()
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    torch.testing.assert_close(block(x.contiguous(memory_format=torch.channels_last)), block(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_low_precision_and_comes_near_float32(dtype):
    torch.manual_seed(0)
    block = ACmix(16, 16, heads=2, kernel_att=3)
    x = torch.randn(2, 16, 8, 8)
    with torch.autocast("cpu", dtype=dtype):
        out = block(x)
    assert out.dtype == dtype
    # three roundings lie between input and output: projection, path, sum
    assert relative(out.float(), block(x)) < 4 * torch.finfo(dtype).eps
    out.float().sum().backward()
    assert block.mix.alpha.grad.isfinite()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"heads": 3}, "8 channels do not divide into 3 heads"),
        ({"kernel_att": 4}, "kernel_att 4"),
        ({"kernel_conv": 2}, "kernel_conv 2"),
        ({"stride": 0}, "stride 0"),
        ({"mix": "max"}, "unknown mix 'max'"),
        ({"shift": "up"}, "unknown shift 'up'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_number(options, message):
    with pytest.raises(ValueError, match=message):
        ACmix(8, 8, **options)


@pytest.mark.parametrize(("size", "window"), [((1, 1), 1), ((3, 6), 5), ((2, 9), 3)], ids=str)
def test_a_map_smaller_than_the_window_gets_the_window_that_fits(size, window):
    block, fitting = ACmix(8, 8, heads=2), ACmix(8, 8, heads=2, kernel_att=window)
    fitting.load_state_dict(block.state_dict())
    x = torch.randn(2, 8, *size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(block(x), fitting(x), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(8, 9, 9), (2, 81, 8), (2, 4, 9, 9), (2, 9, 9, 8), (8,), (2, 8, 3, 9, 9)], ids=str)
def test_an_input_of_another_shape_is_refused_with_the_shape_that_is_wanted(shape):
    wanted = r"ACmix wants maps \(B, in_channels, H, W\) with in_channels = 8, got " + re.escape(str(shape))
    with pytest.raises(ValueError, match=wanted):
        ACmix(8, 8, kernel_att=3)(torch.zeros(shape))


@pytest.mark.parametrize("kind", [LocalAttention, WindowAttention, ReducedAttention, PatchwiseAttention])
@pytest.mark.parametrize("mix", ["learned", "attention", "convolution"])
def test_a_map_without_a_pixel_is_refused_by_every_path(kind, mix):
    with pytest.raises(ValueError, match="a map of 0×3 pixels is empty"):
        ACmix(8, 8, heads=2, attention=kind(2, 4), mix=mix)(torch.zeros(2, 8, 0, 3))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_an_input_of_integers_is_refused(dtype):
    with pytest.raises(ValueError, match=rf"floating-point maps, got {dtype}"):
        ACmix(8, 8, kernel_att=3)(torch.zeros(1, 8, 9, 9, dtype=dtype))


def test_a_block_is_built_on_a_device_and_in_a_dtype_or_without_initialisation():
    assert {p.device.type for p in ACmix(8, 8, device="meta").parameters()} == {"meta"}
    assert {p.dtype for p in ACmix(8, 8, dtype=torch.float64).parameters()} == {torch.float64}
    block, source = torch.nn.utils.skip_init(ACmix, 8, 8, shift="fixed"), ACmix(8, 8, shift="fixed")
    block.load_state_dict(source.state_dict())
    torch.testing.assert_close(block(torch.ones(1, 8, 9, 9)), source(torch.ones(1, 8, 9, 9)))


@pytest.mark.parametrize("mapped", ["alpha", "beta"])
def test_a_block_is_mapped_over_a_path_weight(mapped):
    block, x = ACmix(8, 8, heads=2, kernel_att=3), torch.randn(1, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([0.0, 1.0])

    def run(weight):
        return torch.func.functional_call(block, {f"mix.{mapped}": weight}, (x,))

    torch.testing.assert_close(torch.func.vmap(run)(weights), torch.stack([run(weight) for weight in weights]))
