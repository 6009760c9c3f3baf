from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from acmix import (
    ACmix,
    models,  # noqa: F401 - registers the models with timm
)
from acmix.layers import WindowAttention
from acmix.ops.local_attention import dense, tiled
from acmix.ops.local_mix import cpp as local_mix_cpp
from acmix.ops.native import cxx_compiler
from benchmarks.cases import Case, Setting, build_case
from benchmarks.parity import ParityError, check_parity


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize(
    ("subject", "impl"),
    [
        ("block:32x9", "dense"),
        ("block:32x12s2", "tiled"),
        ("attention:32x9", "tiled"),
        ("shift_conv:32x9", "folded"),
        ("shift_conv:32x9:shift", "auto"),
        ("shift_conv:32x9s2", "dense"),
    ],
)
def test_sound_implementations_pass(subject: str, impl: str, dtype: str) -> None:
    check_parity(build_case(subject, Setting(dtype=dtype, batch_size=2), impl))


@pytest.mark.parametrize(("module", "impl"), [(dense, "dense"), (tiled, "tiled")])
@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_a_slip_in_one_value_is_refused(
    module: ModuleType, impl: str, pass_: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = getattr(module, pass_)

    def broken(*args: Any) -> Any:
        result = sound(*args)
        first = result if isinstance(result, Tensor) else result[0]
        first[0, 0, 0, 0] *= 1.01
        return result

    monkeypatch.setattr(module, pass_, broken)
    with pytest.raises(ParityError, match="it is not timed"):
        check_parity(build_case("attention:32x9", Setting(batch_size=2), impl))


def test_a_path_of_a_users_own_is_checked() -> None:
    class Slip(WindowAttention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return super().attend(q, k, v) * 1.001

    def case(path: type[WindowAttention]) -> Case:
        torch.manual_seed(0)
        block = ACmix(8, 8, 2, attention=path(2, 4, (3, 3)))
        return Case("mine", "auto", block, (torch.randn(2, 8, 6, 6),), classifies=False, setting=Setting())

    check_parity(case(WindowAttention))
    with pytest.raises(ParityError, match="output of Slip"):
        check_parity(case(Slip))


def test_nan_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = dense.forward

    def broken(*args: Any) -> Tensor:
        return torch.full_like(sound(*args), torch.nan)

    monkeypatch.setattr(dense, "forward", broken)
    with pytest.raises(ParityError):
        check_parity(build_case("block:32x9", Setting(batch_size=2), "dense"))


def test_a_whole_network_passes_and_is_left_as_it_was() -> None:
    case = build_case("acmix_resnet26", Setting(batch_size=2, image_size=128))
    before = {key: value.clone() for key, value in case.module.state_dict().items()}
    check_parity(case)
    assert case.module.training
    assert all(parameter.grad is None for parameter in case.module.parameters())
    assert all(torch.equal(value, before[key]) for key, value in case.module.state_dict().items())


@pytest.mark.skipif(cxx_compiler() is None, reason="without a C++ compiler the paths are computed one by one")
def test_a_slip_in_the_gradients_of_both_paths_at_once_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = local_mix_cpp.backward

    def broken(*args: Any) -> Any:
        results = sound(*args)
        results[0][0, 0, 0] *= 1.01  # of one pixel
        return results

    monkeypatch.setattr(local_mix_cpp, "backward", broken)
    with pytest.raises(ParityError, match="gradients of ACmix"):
        check_parity(build_case("acmix_resnet26", Setting(batch_size=2, image_size=64)))
