"""What every path says about itself, and a path of a user's own."""

import math

import pytest
import torch
import torch.nn.functional as F

from acmix import ACmix, layers
from acmix.layers import AttentionPath, LocalAttention, Path, PathMix, WindowAttention, path_weights
from acmix.telemetry.flops import multiply_adds
from acmix.testing import assert_path_parity, error_budget


class RowAttention(AttentionPath):
    """Every pixel attends to its row."""

    def attend(self, q, k, v):
        q, k, v = (m.unflatten(1, (self.heads, self.head_dim)).permute(0, 1, 3, 4, 2) for m in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).permute(0, 1, 4, 2, 3).flatten(1, 2)

    def reference(self, q, k, v):
        q, k, v = (m.unflatten(1, (self.heads, self.head_dim)) for m in (q, k, v))  # (B, N, d, H, W)
        logits = torch.einsum("bndyi,bndyj->bnyij", q * self.head_dim**-0.5, k)
        return torch.einsum("bnyij,bndyj->bndyi", logits.softmax(-1), v).flatten(1, 2)

    def multiply_adds(self, shape):
        return 2 * math.prod(shape) * shape[-1] + self.projection_multiply_adds(shape)

    @classmethod
    def parity_cases(cls):
        yield {"heads": 2, "head_dim": 4}, (5, 7)
        yield {"heads": 1, "head_dim": 6, "project": True}, (4, 3)


def paths_of_ours(base: type[Path] = Path) -> list[type[Path]]:
    """Every path of `acmix.layers` that is not the base of others."""
    own = [kind for kind in base.__subclasses__() if kind.__module__.startswith(layers.__name__)]
    return [leaf for kind in own for leaf in paths_of_ours(kind)] or [base]


def test_the_paths_of_ours_are_all_found():
    assert {path.__name__ for path in paths_of_ours()} == {
        "LocalAttention",
        "PatchwiseAttention",
        "ReducedAttention",
        "ShiftConv",
        "WindowAttention",
    }


@pytest.mark.parametrize("path", [*paths_of_ours(), RowAttention])
def test_a_path_and_its_gradients_match_its_reference(path):
    assert_path_parity(path)


def test_a_path_that_is_built_already_is_checked_as_it_stands():
    block = ACmix(8, 8, heads=2, kernel_att=3)
    before = {key: value.clone() for key, value in block.state_dict().items()}
    assert_path_parity(block.attention, (5, 4), (9, 9))
    assert_path_parity(block.convolution, (5, 4))
    assert all(torch.equal(value, before[key]) for key, value in block.state_dict().items())
    assert block.attention.impl == "auto"
    with pytest.raises(ValueError, match="map sizes"):
        assert_path_parity(block.attention)


def test_a_slip_in_the_output_or_in_a_gradient_is_refused():
    class Slip(RowAttention):
        def attend(self, q, k, v):
            return super().attend(q, k, v) * 1.00001

    class SlipInGradient(RowAttention):
        def attend(self, q, k, v):
            return super().attend(q, k, v + 0.00001 * (v - v.detach()))

    with pytest.raises(AssertionError, match="result 0 of Slip"):
        assert_path_parity(Slip)
    with pytest.raises(AssertionError, match="result 3 of SlipInGradient"):
        assert_path_parity(SlipInGradient)


def test_the_budget_grows_with_plain_pytorchs_error_and_with_the_sum():
    eps = torch.finfo(torch.float32).eps
    assert error_budget(1e-3, torch.float32) == pytest.approx(2e-3 + 2 * eps)
    assert error_budget(0.0, torch.bfloat16, terms=800) == pytest.approx(2 * 2**-7 + 10 * eps)


def test_a_path_of_a_users_own_mixes_and_counts():
    block = ACmix(8, 8, heads=2, attention=RowAttention(2, 4, project=True))
    block(torch.randn(2, 8, 6, 5)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())
    without = ACmix(8, 8, heads=2, mix="convolution")
    row_attention = 2 * 8 * 30 * 5 + 8 * 8 * 30
    assert multiply_adds(block, (8, 6, 5)) == multiply_adds(without, (8, 6, 5)) + row_attention


@pytest.mark.parametrize("build", [lambda: LocalAttention(2, 4, 3), lambda: WindowAttention(2, 4, (3, 3))])
def test_impl_reference_runs_the_reference_with_scale_and_sum(build):
    path = build().double()
    q, k, v, add_to = torch.randn(4, 1, 8, 6, 6, dtype=torch.float64)
    want = path(q, k, v, scale=0.3, add_to=add_to)
    called = []
    reference = path.reference
    path.reference = lambda *maps: called.append(1) or reference(*maps)
    path.impl = "reference"
    torch.testing.assert_close(path(q, k, v, scale=0.3, add_to=add_to), want)
    assert called


def test_window_attention_refuses_an_implementation_that_it_does_not_have():
    with pytest.raises(ValueError, match=r"unknown impl 'fast'.*auto and reference"):
        WindowAttention(2, 4, impl="fast")


@pytest.mark.parametrize("method", ["attend", "reference", "multiply_adds", "parity_cases"])
def test_what_a_path_does_not_say_is_an_error_with_its_name(method):
    own = {name: getattr(RowAttention, name) for name in ("attend", "reference", "multiply_adds")}
    own["parity_cases"] = classmethod(RowAttention.parity_cases.__func__)
    del own[method]
    mute = type("Mute", (AttentionPath,), own)
    block = ACmix(8, 8, heads=2, attention=mute(2, 4))
    with pytest.raises(NotImplementedError, match=f"Mute must define {method}"):
        multiply_adds(block, (8, 6, 5)) if method == "multiply_adds" else assert_path_parity(mute)


def test_path_weights_are_found_by_their_mix_and_named_as_the_model_names_them():
    class Other(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.alpha = torch.nn.Parameter(torch.zeros(()))

    model = torch.nn.Sequential(ACmix(8, 8), Other(), ACmix(8, 8, mix="convex"), ACmix(8, 8, mix="sum"))
    found = path_weights(model)
    assert list(found) == ["0.mix.alpha", "0.mix.beta", "2.mix.alpha"]
    assert all(found[name] is model.get_parameter(name) for name in found)
    assert list(path_weights(PathMix())) == ["alpha", "beta"]
