"""Sweep the tiles of the Triton kernels on this GPU, at the four shapes of an ACmix ResNet.

    python -m benchmarks.tune_triton [--batch-size 128] [--dtype bf16] [--seconds 150] [--json FILE]

Starting from the tiles that the operations' tiles.py choose, each kernel is tried with one size changed at a time, and
from the best so again, until nothing helps or the time is up. All kernels go through a round together, so that their
candidates are compiled on all cores. A candidate must agree with the reference before it is timed. The table gives
milliseconds (median) and how many times the memory floor that is: every map read or written once, at the copy
bandwidth measured here. Exit status: 1 if a candidate gave a wrong result, 2 without a CUDA device.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, astuple, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from acmix.checkpoint.atomic import prove_writable
from acmix.errors import UserError
from acmix.ops import reference
from acmix.ops.implementations import Window
from acmix.ops.local_attention.triton import tiles as attention_tiles
from acmix.ops.local_attention.triton.launch import Geometry
from acmix.ops.shift_conv.op import convolve_plain
from acmix.ops.shift_conv.triton import tiles as convolution_tiles
from acmix.process.program import FAILED, Arguments, run_program
from benchmarks.machine import machine_row
from benchmarks.report import write_json
from benchmarks.roofline import measure_roofline

SHAPES = ((16, 56), (32, 28), (64, 14), (128, 7))  # head width, side of the map; 4 heads
HEADS, ATTENDED, CONVOLVED = 4, Window(7, 1, 1), Window(3, 1, 1)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}
TOLERANCE = {"bf16": 2e-2, "fp16": 4e-3, "float32": 2e-3}  # relative to float64; float32 may multiply in tf32
Result = float | str  # milliseconds, or why there are none


@dataclass(frozen=True)
class AttentionTile:
    """What a tile of the attention kernels is made of; its columns follow from the problem."""

    height: int
    width: int
    slots: int
    warps: int
    stages: int

    def neighbours(self) -> Iterator["AttentionTile"]:
        """This tile with one size changed."""
        for height, width in ((2, 8), (4, 4), (8, 4), (4, 8), (2, 16), (8, 8), (4, 16), (8, 16)):
            if (height, width) != (self.height, self.width):
                yield replace(self, height=height, width=width)
        yield from (replace(self, slots=slots) for slots in (16, 32, 64) if slots != self.slots)
        yield from (replace(self, warps=warps) for warps in (1, 2, 4, 8) if warps != self.warps)
        yield from (replace(self, stages=stages) for stages in (1, 2, 3) if stages != self.stages)

    def forced(self) -> AbstractContextManager[None]:
        """The kernels use this tile inside the context."""
        budget = attention_tiles.Budget(self.height * self.width, self.slots, self.warps, self.stages)

        def tile(_: str, surroundings: attention_tiles.Surroundings) -> attention_tiles.Tile:
            return attention_tiles.shape_tile(surroundings, self.height, self.width, budget)

        return attention_tiles.forced_tile(tile)


@dataclass(frozen=True)
class ConvolutionTile:
    """A tile of the kernels of the convolution path."""

    pixels: int
    channels: int
    warps: int
    unroll: int

    def neighbours(self) -> Iterator["ConvolutionTile"]:
        """This tile with one size changed."""
        yield from (replace(self, pixels=pixels) for pixels in (self.pixels // 2, 2 * self.pixels))
        yield from (replace(self, channels=channels) for channels in (8, 16, 32) if channels != self.channels)
        yield from (replace(self, warps=warps) for warps in (1, 2, 4, 8) if warps != self.warps)
        yield from (replace(self, unroll=unroll) for unroll in (1, 2, 4, 6) if unroll != self.unroll)
        yield replace(self, pixels=2 * self.pixels, warps=min(8, 2 * self.warps))
        yield replace(self, pixels=self.pixels // 2, warps=max(1, self.warps // 2))

    def forced(self) -> AbstractContextManager[None]:
        """The kernels use this tile inside the context."""
        sizes = asdict(self)
        return convolution_tiles.forced_tile(maps=sizes, weight=sizes)


Candidate = AttentionTile | ConvolutionTile


@dataclass(frozen=True)
class Problem:
    """What all kernels of a shape are run on."""

    head_dim: int
    side: int
    batch: int
    dtype: torch.dtype

    def draw(self, channels: int, device: str) -> Tensor:
        """A channels_last map, random on a GPU; elsewhere nobody reads it."""
        size = (self.batch, self.side, self.side, channels)
        make = torch.randn if device == "cuda" else torch.empty
        return make(size, device=device, dtype=self.dtype).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Kernel:
    """One kernel on one problem: how to run it, what it must give for the first image, the fewest bytes it moves."""

    problem: Problem
    name: str
    start: Candidate
    run: Callable[[], tuple[Tensor, ...]]
    exact: tuple[Tensor, ...]
    bytes_moved: int


def build_kernels(problem: Problem, device: str = "cuda") -> dict[str, Kernel]:
    """The kernels of both paths, by their names. Without a GPU they can be compiled, but not run."""
    from acmix.ops.local_attention.triton.backward import key_gradient, query_gradient
    from acmix.ops.local_attention.triton.forward import forward
    from acmix.ops.shift_conv.triton import kernels as convolution

    torch.manual_seed(0)
    head_dim, channels = problem.head_dim, HEADS * problem.head_dim
    maps, grad, dmaps = (problem.draw(count * channels, device) for count in (3, 1, 3))
    (q, k, v), (dq, dk, dv) = maps.chunk(3, 1), dmaps.chunk(3, 1)
    position = torch.randn(head_dim, 2, device=device)
    weight = torch.randn(3 * HEADS, 3, 3, channels, device=device).permute(3, 0, 1, 2)
    geometry = Geometry.of(q, position, ATTENDED)
    lse = torch.empty(problem.batch, HEADS, problem.side, problem.side, device=device)
    attended, delta, convolved = torch.empty_like(grad), lse, torch.empty_like(grad)
    exact: list[Tensor] = []
    if device == "cuda":
        attended, lse = forward(q, k, v, position, ATTENDED)
        delta, _ = query_gradient(geometry, (grad, q, k, v), position, attended, lse, dq)
        exact = _exact(maps[:1], grad[:1], position, weight)
    planar = convolution.as_maps(grad, head_dim)

    def run_forward() -> tuple[Tensor, ...]:
        return (forward(q, k, v, position, ATTENDED)[0],)

    def run_dq() -> tuple[Tensor, ...]:
        query_gradient(geometry, (grad, q, k, v), position, attended, lse, dq)
        return (dq,)

    def run_dkv() -> tuple[Tensor, ...]:
        key_gradient(geometry, (grad, q, k, v), position, lse, delta, dk, dv)
        return dk, dv

    def run_convolution() -> tuple[Tensor, ...]:
        convolution.forward_into(convolved, maps, weight, CONVOLVED)
        return (convolved,)

    def run_dmaps() -> tuple[Tensor, ...]:
        convolution.backward_maps_into([dmaps], planar, weight, CONVOLVED)
        return (dmaps,)

    def run_dweight() -> tuple[Tensor, ...]:
        return (convolution.backward_weight(maps, planar, weight, CONVOLVED),)

    def of_attention(tile: attention_tiles.Tile) -> AttentionTile:
        return AttentionTile(tile.height, tile.width, tile.rows * tile.columns, tile.warps, tile.stages)

    def of_convolution(tile: convolution_tiles.Tile) -> ConvolutionTile:
        return ConvolutionTile(tile.pixels, tile.channels, tile.warps, tile.unroll)

    one_map, one_row = grad.numel() * grad.element_size(), lse.numel() * lse.element_size()
    query, key = geometry.query_tile, geometry.key_tile
    map_tile, weight_tile = (tile(head_dim) for tile in (convolution_tiles.map_tile, convolution_tiles.weight_tile))
    kernels = [
        Kernel(
            problem, "forward", of_attention(query("forward")), run_forward, tuple(exact[:1]), 4 * one_map + one_row
        ),
        Kernel(problem, "dq", of_attention(query("dq")), run_dq, tuple(exact[1:2]), 6 * one_map + 2 * one_row),
        Kernel(problem, "dkv", of_attention(key("dkv")), run_dkv, tuple(exact[2:4]), 6 * one_map + 2 * one_row),
        Kernel(problem, "conv", of_convolution(map_tile), run_convolution, tuple(exact[4:5]), 4 * one_map),
        Kernel(problem, "dconv", of_convolution(map_tile), run_dmaps, tuple(exact[5:6]), 4 * one_map),
        Kernel(problem, "dweight", of_convolution(weight_tile), run_dweight, (), 4 * one_map),
    ]
    return {kernel.name: kernel for kernel in kernels}


def _exact(maps: Tensor, grad: Tensor, position: Tensor, weight: Tensor) -> list[Tensor]:
    """Attention's output and gradients, the convolution's output and the gradient of its maps, in float64."""
    q, k, v = leaves = [m.double().requires_grad_() for m in maps.chunk(3, 1)]
    attended = reference.local_attention(q, k, v, position.double(), *astuple(ATTENDED))
    grads = torch.autograd.grad(attended, leaves, grad.double())
    convolved = convolve_plain(q, k, v, weight.double(), CONVOLVED.stride, CONVOLVED.dilation)
    dmaps = torch.cat(torch.autograd.grad(convolved, leaves, grad.double()), 1)
    return [attended.detach(), *grads, convolved.detach(), dmaps]


def compile_candidate(problem: Problem, name: str, candidate: Candidate) -> str:
    """Leave a kernel with this tile in Triton's cache. Returns why it does not compile, or an empty text."""
    from triton.errors import TritonError
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def compile_only(self: JITFunction, *args: object, **kwargs: object) -> object:
        return run(self, *args, **(kwargs | {"warmup": True}))

    JITFunction.run = compile_only
    try:
        with candidate.forced():
            build_kernels(problem, "cpu")[name].run()
    except (TritonError, RuntimeError) as reason:
        return f"does not compile: {type(reason).__name__}"
    finally:
        JITFunction.run = run
    return ""


def milliseconds(kernel: Kernel, candidate: Candidate, tolerance: float) -> Result:
    """Median time of a candidate, or why there is none."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    with candidate.forced():
        try:
            results = kernel.run()
        except OutOfResources:
            return "does not fit"
        for result, exact in zip(results, kernel.exact, strict=False):
            error = ((result[:1].double() - exact).norm() / exact.norm()).item()
            if not error <= tolerance:
                return f"wrong: relative error {error:.1e}"
        return float(do_bench(kernel.run, warmup=3, rep=15, return_mode="median"))


def sweep(batch: int, dtype: str, seconds: float) -> list[dict[str, Any]]:
    """One row for each shape and kernel: the default tile, the best one, all that were tried."""
    deadline = time.monotonic() + seconds
    copy = measure_roofline(torch.device("cuda"), DTYPES[dtype]).copy
    problems = [Problem(head_dim, side, batch, DTYPES[dtype]) for head_dim, side in SHAPES]
    kernels = [kernel for problem in problems for kernel in build_kernels(problem).values()]
    tried: list[dict[Candidate, Result]] = [{} for _ in kernels]
    wanted: list[list[Candidate]] = [[kernel.start, *kernel.start.neighbours()] for kernel in kernels]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        while any(wanted) and time.monotonic() < deadline:
            tasks = [(k.problem, k.name, tile) for k, tiles in zip(kernels, wanted, strict=True) for tile in tiles]
            failures = iter(list(pool.map(compile_candidate, *zip(*tasks, strict=True))))
            for kernel, tiles, results in zip(kernels, wanted, tried, strict=True):
                for tile in tiles:
                    failure = next(failures)
                    if not results or time.monotonic() < deadline:
                        results[tile] = failure or milliseconds(kernel, tile, TOLERANCE[dtype])
            wanted = [
                [tile for tile in best.neighbours() if tile not in results] if (best := _best(results)) else []
                for results in tried
            ]
    rows = []
    for kernel, results in zip(kernels, tried, strict=True):
        candidates = [asdict(tile) | {"result": result} for tile, result in results.items()]
        row = {"channels": HEADS * kernel.problem.head_dim, "side": kernel.problem.side, "kernel": kernel.name}
        best = _best(results)
        row |= {"floor_ms": 1e3 * kernel.bytes_moved / copy, "default": candidates[0], "tried": candidates}
        rows.append(row | {"best": None if best is None else asdict(best) | {"result": results[best]}})
        print(describe_row(rows[-1]), flush=True)
    return rows


def _best(results: dict[Candidate, Result]) -> Candidate | None:
    timed = {tile: result for tile, result in results.items() if isinstance(result, float)}
    return min(timed, key=lambda tile: timed[tile], default=None)


def describe_row(row: dict[str, Any]) -> str:
    """One line: the default's time, the best tile and its time, and each over the memory floor."""
    head = f"{row['channels']:>4}ch {row['side']:>2}² {row['kernel']:<7}"
    wrong = [t for t in row["tried"] if isinstance(t["result"], str) and t["result"].startswith("wrong")]

    def figure(tried: dict[str, Any] | None) -> str:
        if tried is None or not isinstance(tried["result"], float):
            return str(tried and tried["result"])
        sizes = "/".join(str(size) for name, size in tried.items() if name != "result")
        return f"{tried['result']:.3f} ms ({tried['result'] / row['floor_ms']:.1f}× floor) {sizes}"

    tail = f"{len(row['tried'])} tried" + (f", {len(wrong)} WRONG: {wrong[0]}" if wrong else "")
    return f"{head} default {figure(row['default'])} | best {figure(row['best'])} | {tail}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_program(lambda: run(arguments))


def run(arguments: Sequence[str] | None) -> int:
    """Sweep as the command line says; returns the exit status."""
    parser = Arguments(
        prog="python -m benchmarks.tune_triton",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--seconds", type=float, default=150.0, help="time for the whole sweep, about")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every candidate there")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise UserError("PyTorch sees no CUDA device here; the sweep needs one")
    if options.json:
        prove_writable("--json", options.json)
    print("attention's tiles as height/width/slots/warps/stages, the convolution's as pixels/channels/warps/unroll")
    rows = sweep(options.batch_size, options.dtype, options.seconds)
    if options.json:
        machine = machine_row(torch.device("cuda"))
        write_json({"machine": machine, "dtype": options.dtype, "rows": rows}, options.json)
    wrong = any(str(tried["result"]).startswith("wrong") for row in rows for tried in row["tried"])
    return FAILED if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
