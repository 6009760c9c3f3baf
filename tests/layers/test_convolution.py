"""The convolution path: kinds of shift, initialisation, scale."""

import pytest
import torch

from acmix.layers import ShiftConv

N, D = 3, 4


def maps(height: int = 7, width: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, N * D, height, width, generator=generator, dtype=torch.float64) for _ in range(3)]


def module(**options) -> ShiftConv:
    torch.manual_seed(1)
    return ShiftConv(N, D, **options).double()


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"dilation": 2}, {"kernel_size": 5}, {"bias": True}])
def test_tensor_shifts_and_fixed_kernels_equal_the_learned_kernels_at_their_start(options):
    learned = module(kind="learned", **options)
    want = learned(*maps())
    for kind in ("shift", "fixed"):
        other = module(kind=kind, **options)
        other.load_state_dict({k: v for k, v in learned.state_dict().items() if k.startswith("fc_")})
        torch.testing.assert_close(other(*maps()), want)


def test_at_the_start_every_tap_looks_at_its_own_neighbour():
    conv = module()
    conv.fc_weight.data.zero_()
    conv.fc_weight.data[0, 0] = 1  # the upper left tap reads the first map of q
    q, k, v = maps()
    out = conv(q, k, v).unflatten(1, (D, N))
    for head in range(N):
        torch.testing.assert_close(out[:, :, head, 1:, 1:], q[:, :D, :-1, :-1])
        assert not out[:, :, head, 0].any()


@pytest.mark.parametrize("kind", ["shift", "fixed", "random", "learned", "full"])
def test_stride_gives_a_map_of_half_the_size_rounded_up_and_every_parameter_a_gradient(kind):
    conv = module(kind=kind, stride=2, bias=kind != "full")
    out = conv(*maps())
    assert out.shape == (2, N * D, 4, 3)
    out.square().sum().backward()
    assert all(parameter.grad.any() for parameter in conv.parameters())


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("shift", ["fc_weight"]),
        ("fixed", ["fc_weight"]),
        ("random", ["fc_weight", "shift_weight"]),
        ("learned", ["fc_weight", "shift_weight"]),
        ("full", ["weight"]),
    ],
)
def test_a_kind_holds_in_its_state_dict_what_it_trains(kind, names):
    conv = module(kind=kind)
    assert list(conv.state_dict()) == names == [name for name, _ in conv.named_parameters()]


@pytest.mark.parametrize("kind", ["shift", "learned", "full"])
def test_the_scale_multiplies_the_path(kind):
    conv = module(kind=kind, bias=True)
    torch.testing.assert_close(conv(*maps(), scale=torch.tensor(0.3).double()), 0.3 * conv(*maps()))


def test_random_kernels_are_not_the_shifts():
    torch.testing.assert_close(module(kind="fixed").shift_weight, module(kind="learned").shift_weight.data)
    assert not torch.equal(module(kind="random").shift_weight, module(kind="learned").shift_weight)


@pytest.mark.parametrize(
    ("options", "message"), [({"kind": "roll"}, "'roll'.*shift, fixed"), ({"kernel_size": 4}, "4 has no centre")]
)
def test_an_unknown_kind_or_an_even_kernel_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ShiftConv(N, D, **options)
