"""What torch.compile makes of a network: as exact as without it, nothing written outside its memory, found again."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmix import models  # noqa: F401 - registers the networks
from acmix.engine.inductor import keep_stores_inside
from acmix.engine.run_folder import COMPILED
from acmix.ops.native import cxx_compiler
from acmix.process import compiled
from acmix.testing import error_budget, relative_error

pytestmark = pytest.mark.skipif(cxx_compiler() is None, reason="torch.compile needs a C++ compiler")

TINY = (
    "--config", "configs/quickstart.yaml", "data.batch_size=16", "model.kwargs.base_width=8", "run.threads=1",
    "precision.compile=true", "run.log_every=1",
)  # fmt: skip
NETWORKS = {
    "resnet": ("acmix_resnet26", {"base_width": 16, "stem": "cifar", "layers": (1, 1, 1, 1)}),
    "swin": (
        "acmix_swin_tiny",
        {"img_size": 32, "window_size": 4, "embed_dim": 32, "depths": (2, 2), "heads": (2, 16)},
    ),
    "pvt": (
        "acmix_pvt_tiny",
        {
            "img_size": 32,
            "embed_dims": (16, 32),
            "heads": (1, 2),
            "depths": (1, 1),
            "reductions": (4, 1),
            "mlp_ratios": (4.0, 4.0),
        },
    ),
    "san": (
        "acmix_san10",
        {"base_width": 16, "stem": "cifar", "kernel_att": (3, 3, 3, 3, 7), "layers": (1, 1, 1, 1, 1)},
    ),
}


class Fenced:
    """Memory for the tensors of compiled code, each between bytes that nothing may change."""

    BYTES, MARK = 256, 0xA5

    def __init__(self) -> None:
        self._all: list[tuple[Tensor, Tensor, str]] = []

    def empty_strided(self, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1 if 0 not in size else 0
        content = count * dtype.itemsize
        memory = torch.full((content + 2 * self.BYTES + 64,), self.MARK, dtype=torch.uint8)
        start = self.BYTES + -(memory.data_ptr() + self.BYTES) % 64
        self._all.append((memory[:start], memory[start + content :], f"{size} {stride} {dtype}"))
        return memory[start : start + content].view(dtype).as_strided(size, stride)

    def trespassed(self) -> list[str]:
        """The tensors beside which something was written."""
        return [
            name for before, after, name in self._all if any((fence != self.MARK).any() for fence in (before, after))
        ]


@pytest.fixture
def fenced(monkeypatch: pytest.MonkeyPatch) -> Fenced:
    fenced = Fenced()
    monkeypatch.setattr(torch._C._dynamo.guards, "_empty_strided_cpu", fenced.empty_strided)
    torch.compiler.reset()
    return fenced


def test_a_compiled_sum_stores_no_further_than_its_row(fenced: Fenced) -> None:
    keep_stores_inside()
    side = 27  # whole vectors and a rest
    generator = torch.Generator().manual_seed(0)
    turned, maps, bias = (
        torch.randn(shape, generator=generator)
        for shape in ((2, side, 32, side), (2, side, side, 32), (32, side, side))
    )

    def normalised(turned: Tensor, maps: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(
            turned.permute(0, 3, 1, 2) + torch.roll(maps + bias.permute(1, 2, 0), (2, 2), (1, 2)), (32,)
        )

    got = torch.compile(normalised, dynamic=False)(turned, maps, bias)
    assert fenced.trespassed() == []
    torch.testing.assert_close(got, normalised(turned, maps, bias))


def smooth_network(name: str, **kwargs: Any) -> nn.Module:
    """A network with SiLU for its ReLU layers, whose gradients the rounding of an input near zero would turn over."""
    network: nn.Module = timm.create_model(name, num_classes=5, drop_path_rate=0.0, **kwargs)
    for part in network.modules():
        for child, layer in part.named_children():
            if isinstance(layer, nn.ReLU):
                setattr(part, child, nn.SiLU())
    return network


def gradients(run: Callable[[Tensor], Tensor], network: nn.Module, images: Tensor) -> Tensor:
    """Those of all parameters for a training step on images of 5 classes, one after the other."""
    loss = F.cross_entropy(run(images), torch.arange(len(images)) % 5)
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, [*network.parameters()])])


@pytest.mark.slow
@pytest.mark.parametrize("size", [(32, 32), (35, 29)], ids=["square", "odd"])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_compiled_training_step_is_as_exact_as_plain_pytorch(
    network: str, size: tuple[int, int], fenced: Fenced
) -> None:
    keep_stores_inside()
    name, kwargs = NETWORKS[network]
    torch.manual_seed(0)
    net = smooth_network(name, **kwargs).train()
    images = torch.randn(3, 3, *size)
    plain = smooth_network(name, impl="reference", **kwargs).train()
    plain.load_state_dict(net.state_dict())
    exact = copy.deepcopy(plain).double()
    target = gradients(exact, exact, images.double())
    budget = error_budget(relative_error(gradients(plain, plain, images), target), torch.float32)
    error = relative_error(gradients(torch.compile(net, dynamic=False), net, images), target)
    assert fenced.trespassed() == []
    assert error <= budget


def test_what_a_killed_compiler_left_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_GIVEN", {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)})
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    @torch.compile
    def twice(x: Tensor) -> Tensor:
        return x.sin() + x

    x = torch.arange(40.0)
    twice(x)
    library = next(tmp_path.glob("*/*.main.so"))
    library.unlink()  # this process has it in memory
    library.touch()  # as the linker begins
    (library.parent / f"{library.stem}_CxxBuild").mkdir()
    torch.compiler.reset()
    torch._inductor.utils.clear_caches()
    compiled.keep_compiled(tmp_path)
    torch.testing.assert_close(twice(x), x.sin() + x)
    assert library.stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("where", [None, "elsewhere"])
def test_a_resumed_run_compiles_nothing_again(where: str | None, launcher, tmp_path: Path) -> None:
    run, cache = tmp_path / "run", tmp_path / (where or f"run/{COMPILED}")
    choice = () if where is None else (f"precision.compile_cache={cache}",)
    unset = {"TORCHINDUCTOR_CACHE_DIR": "", "TRITON_CACHE_DIR": ""}  # the tests set their own
    made = []
    for steps in (2, 3):
        options = (*TINY, *choice, f"run.dir={run}", f"schedule.steps={steps}", "--resume", "auto")
        assert launcher.start("train.py", *options, env=unset, fresh=True).wait(600) == 0
        made.append({file.name for file in cache.rglob("*.so")})
    assert made[0]
    assert made[1] == made[0]
