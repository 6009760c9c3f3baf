"""The operations in graphs: compiled with dynamic shapes, exported, saved and loaded elsewhere."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from acmix import ACmix
from acmix.ops import local_attention
from acmix.ops.native import cxx_compiler


def test_inductor_compiles_training_on_one_image_of_any_size() -> None:
    """Inductor cannot order the dynamic strides of views, such as q, k and v, that it keeps for the backward pass."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((24, 8, 1, 1), (4, 2), (8, 8, 1, 1))
    weights = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    projection, position, after = weights

    def run(x: Tensor) -> Tensor:
        q, k, v = F.conv2d(x, projection).chunk(3, 1)
        return F.conv2d(local_attention(q, k, v, position, 3), after)

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True)
    for size in ((9, 10), (12, 7)):
        x = torch.randn(1, 8, *size, generator=generator)
        for side in (2, 3):
            torch._dynamo.maybe_mark_dynamic(x, side)
        got, want = (torch.autograd.grad(f(x).square().sum(), weights) for f in (compiled, run))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


@pytest.mark.skipif(cxx_compiler() is None, reason="without a C++ compiler the paths are computed one by one")
def test_inductor_keeps_q_k_and_v_between_convolutions_without_a_copy() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3), ACmix(16, 16, heads=4, kernel_att=5), torch.nn.Conv2d(16, 4, 3)
    )
    images = torch.randn(2, 3, 24, 24)
    torch.compiler.reset()
    compiled = torch.compile(network, fullgraph=True)
    _, code = run_and_get_code(lambda: compiled(images).square().sum().backward())
    text = "\n".join(code)
    assert "acmix.local_mix_backward" in text
    assert "empty_strided_cpu((968, 48), (48, 1)" in text  # q, k and v as the projection gives them
    assert "empty_strided_cpu((2, 22, 22" not in text


def test_an_exported_block_takes_maps_of_any_size() -> None:
    block = ACmix(3, 8, heads=2, kernel_att=5).eval()
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        block, (torch.randn(2, 3, 6, 7),), dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},)
    )
    for shape in ((2, 3, 6, 7), (3, 3, 2, 2), (4, 3, 40, 30)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(program.module()(x), block(x))


def test_one_compiled_graph_takes_maps_smaller_and_larger_than_the_window() -> None:
    block = ACmix(3, 8, heads=2, impl="tiled")
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for size in ((9, 10), (3, 6), (2, 2)):
        x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0), requires_grad=True)
        got, want = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (compiled, block))
        torch.testing.assert_close(got, want)
    assert graphs["unique_graphs"] == before + 1


@pytest.mark.parametrize(
    ("impl", "imports", "loads"),
    [("auto", "torch", False), ("auto", "torch, acmix.ops", True), ("reference", "torch", True)],
)
def test_a_saved_program_loads_where_its_operations_are_known(
    impl: str, imports: str, loads: bool, tmp_path: Path
) -> None:
    file = tmp_path / "block.pt2"
    torch.export.save(torch.export.export(ACmix(3, 8, kernel_att=3, impl=impl), (torch.randn(1, 3, 6, 6),)), file)
    program = f"import {imports}; torch.export.load({str(file)!r}).module()(torch.randn(1, 3, 6, 6))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (run.returncode == 0) is loads, run.stderr
