"""The Triton kernels, compiled ahead of time for compute capability 9.0 by Triton's own compiler; no GPU needed.

Launches go through Triton's `warmup`, with the tiles and arguments that a GPU would get: what is looked at here is the
machine code that will run there.
"""

import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from acmix.ops.implementations import Window
from acmix.ops.local_attention.triton import kernels
from acmix.ops.shift_conv.triton import kernels as convolution

SPILLED = 128  # bytes a thread
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
    pytest.mark.skipif(not (TOOLS / "cuobjdump").exists(), reason=f"this Triton brings no cuobjdump in {TOOLS}"),
]


class HopperWithoutADevice:
    """What Triton asks of its driver before it compiles: the target, and which device and stream are current."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Compiled:
    kernel: str
    registers: int
    stack: int
    shared: int
    assembly: str


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Compiled]]:
    """Every kernel that the test launches, compiled but not run."""
    results: list[Compiled] = []
    kernels_seen: set[JITFunction] = set()
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: object, **kwargs: object) -> object:
        kernels_seen.add(self)
        self.device_caches.clear()
        binary = run(self, *args, **(kwargs | {"warmup": True}))
        results.append(inspect(self.__name__, binary, tmp_path / f"{len(results)}.cubin"))
        return binary

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(triton.runtime.driver, "_active", HopperWithoutADevice())
    yield results
    for kernel in kernels_seen:
        kernel.device_caches.clear()  # a GPU of this process, if there is one, may be another model


def inspect(name: str, binary: object, path: Path) -> Compiled:
    """Registers, stack (where spills go) and shared memory, as NVIDIA's own tool reports them."""
    path.write_bytes(binary.asm["cubin"])
    command = [str(TOOLS / "cuobjdump"), "-res-usage", str(path)]
    report = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", report)}
    assert usage["LOCAL"] == 0
    return Compiled(name, usage["REG"], usage["STACK"], binary.metadata.shared, binary.asm["ptx"])


def launch_all(head_dim: int, side: int, dtype: torch.dtype, kernel_size: int = 7, stride: int = 1) -> None:
    size, heads = (side, side), 4
    q, k, v = (
        torch.zeros(2, heads * head_dim, *size, dtype=dtype).to(memory_format=torch.channels_last) for _ in range(3)
    )
    position_weight = torch.zeros(head_dim, 2)
    window = Window(kernel_size, stride, dilation=1)
    out, lse = kernels.forward(q, k, v, position_weight, window)
    kernels.backward(torch.zeros_like(out), q, k, v, position_weight, out, lse, window)


def assert_no_spills(compiled: list[Compiled]) -> None:
    assert len(compiled) == 3
    for kernel in compiled:
        assert kernel.stack == 0, f"{kernel.kernel} spills {kernel.stack} bytes at {kernel.registers} registers"


@pytest.mark.parametrize(("head_dim", "side"), [(16, 56), (32, 28), (64, 14)])
def test_bfloat16_kernels_of_resnet_hardly_spill(compiled: list[Compiled], head_dim: int, side: int) -> None:
    """Their tiles were the fastest on a GPU, where a few registers in memory cost less than a second warp."""
    launch_all(head_dim, side, torch.bfloat16)
    assert len(compiled) == 3
    assert all(kernel.stack <= SPILLED for kernel in compiled)
    for kernel in compiled:
        assert "mma.sync" in kernel.assembly or "wgmma" in kernel.assembly
        assert re.search(r"(cp\.async\.cg\S*|ld\.global\S*v4\S*)", kernel.assembly), "no 128-bit loads"


def test_stride_2_kernels_compile_without_spills(compiled: list[Compiled]) -> None:
    launch_all(24, 28, torch.float16, stride=2)
    assert_no_spills(compiled)


def test_float32_kernels_compile_without_spills(compiled: list[Compiled]) -> None:
    launch_all(64, 14, torch.float32)
    assert_no_spills(compiled)


def test_kernels_for_the_widest_heads_compile(compiled: list[Compiled]) -> None:
    launch_all(128, 7, torch.bfloat16)
    assert len(compiled) == 3
    assert all(kernel.shared <= 227 * 1024 for kernel in compiled), "more shared memory than a block can have"


@pytest.mark.parametrize(("head_dim", "side", "wide"), [(16, 56, False), (128, 7, False), (16, 56, True)])
def test_convolution_kernels_of_resnet_compile_with_vector_loads(
    compiled: list[Compiled], head_dim: int, side: int, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """wide: with the 64-bit offsets that larger maps need."""
    monkeypatch.setattr(convolution, "_is_wide", lambda *maps: wide)
    window, channels = Window(3, 1, 1), 4 * head_dim
    maps, out = (
        torch.zeros(2, side, side, count * channels, dtype=torch.bfloat16).permute(0, 3, 1, 2) for count in (3, 1)
    )
    weight = torch.zeros(12, 3, 3, channels).permute(3, 0, 1, 2)
    convolution.forward_into(out, maps, weight, window, out, torch.zeros(()))
    convolution.backward_maps_into([maps], out, weight, window, accumulate=True)
    convolution.backward_weight(maps, out, weight, window)
    assert [kernel.kernel for kernel in compiled] == ["_maps_kernel", "_maps_kernel", "_weight_kernel"]
    assert all(kernel.stack <= 4 * SPILLED for kernel in compiled)
    assert all("v4.b32" in kernel.assembly for kernel in compiled)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 1), (7, 1), (7, 2), (13, 1)])
@pytest.mark.parametrize(("head_dim", "side"), [(8, 56), (12, 28), (24, 28), (48, 14), (64, 14)])
def test_no_kernel_spills_much_up_to_64_channels_a_head(
    compiled: list[Compiled], head_dim: int, side: int, kernel_size: int, stride: int, dtype: torch.dtype
) -> None:
    launch_all(head_dim, side, dtype, kernel_size, stride)
    assert len(compiled) == 3
    assert all(kernel.stack <= (0 if dtype == torch.float32 else SPILLED) for kernel in compiled)
