"""Sweep the tiles of the local-attention kernels on this GPU, at the four shapes of an ACmix ResNet.

    python -m benchmarks.tune_triton [--batch-size 128] [--dtype bf16] [--seconds 150] [--json FILE]

Starting from the tile that the kernels' tiles.py chooses, each kernel is tried with one size changed at a time, and
from the best so again, until nothing helps or the time is up. A candidate must agree with the reference before it is
timed. The table gives milliseconds (median) and how many times the memory floor that is: every map read or written
once, at the copy bandwidth measured here. Exit status: 1 if a candidate gave a wrong result, 2 without a CUDA device.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from acmix.checkpoint.atomic import prove_writable
from acmix.errors import UserError
from acmix.ops import reference
from acmix.ops.implementations import Window
from acmix.ops.local_attention.triton.launch import Geometry
from acmix.ops.local_attention.triton.tiles import Budget, Surroundings, forced_tile, shape_tile
from acmix.process.program import FAILED, Arguments, run_program
from benchmarks.machine import machine_row
from benchmarks.report import write_json
from benchmarks.roofline import measure_roofline

SHAPES = ((16, 56), (32, 28), (64, 14), (128, 7))  # head width, side of the map; 4 heads
HEADS, WINDOW = 4, Window(kernel_size=7, stride=1, dilation=1)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}
TOLERANCE = {"bf16": 2e-2, "fp16": 4e-3, "float32": 2e-3}  # relative to float64; float32 may multiply in tf32


@dataclass(frozen=True)
class Candidate:
    """What a tile is made of; columns follow from the problem."""

    height: int
    width: int
    slots: int
    warps: int
    stages: int

    def neighbours(self) -> Iterator["Candidate"]:
        """This candidate with one size changed."""
        for height, width in ((2, 8), (4, 4), (8, 4), (4, 8), (2, 16), (8, 8), (4, 16)):
            if (height, width) != (self.height, self.width):
                yield replace(self, height=height, width=width)
        yield from (replace(self, slots=slots) for slots in (16, 32, 64) if slots != self.slots)
        yield from (replace(self, warps=warps) for warps in (1, 2, 4, 8) if warps != self.warps)
        yield from (replace(self, stages=stages) for stages in (1, 2, 3) if stages != self.stages)


@dataclass(frozen=True)
class Kernel:
    """One kernel on one problem: how to run it, what it must give, the fewest bytes it moves."""

    name: str
    start: Candidate
    run: Callable[[], tuple[Tensor, ...]]
    exact: tuple[Tensor, ...]
    bytes_moved: int


def build_kernels(head_dim: int, side: int, batch: int, dtype: torch.dtype) -> list[Kernel]:
    """Forward, dq and dkv on random channels_last maps, with the reference's results in float64 for the first image."""
    from acmix.ops.local_attention.triton.backward import key_gradient, query_gradient
    from acmix.ops.local_attention.triton.forward import forward

    torch.manual_seed(0)
    size = (batch, HEADS * head_dim, side, side)
    grad, q, k, v = (
        torch.randn(size, device="cuda", dtype=dtype).to(memory_format=torch.channels_last) for _ in range(4)
    )
    weight = torch.randn(head_dim, 2, device="cuda")
    first = [m[:1].double().requires_grad_() for m in (q, k, v)]
    exact_out = reference.local_attention(first[0], first[1], first[2], weight.double(), *astuple(WINDOW))
    exact = torch.autograd.grad(exact_out, first, grad[:1].double())
    geometry = Geometry.of(q, weight, WINDOW)
    out, lse = forward(q, k, v, weight, WINDOW)
    delta = query_gradient(geometry, (grad, q, k, v), weight, out, lse)[1]
    one_map, one_row = q.numel() * q.element_size(), lse.numel() * lse.element_size()

    def start(tile: Any) -> Candidate:
        return Candidate(tile.height, tile.width, tile.rows * tile.columns, tile.warps, tile.stages)

    return [
        Kernel(
            "forward",
            start(geometry.query_tile("forward")),
            lambda: forward(q, k, v, weight, WINDOW)[:1],
            (exact_out.detach(),),
            4 * one_map + one_row,
        ),
        Kernel(
            "dq",
            start(geometry.query_tile("dq")),
            lambda: query_gradient(geometry, (grad, q, k, v), weight, out, lse)[:1],
            exact[:1],
            6 * one_map + 2 * one_row,
        ),
        Kernel(
            "dkv",
            start(geometry.key_tile("dkv")),
            lambda: key_gradient(geometry, (grad, q, k, v), weight, lse, delta),
            exact[1:],
            6 * one_map + 2 * one_row,
        ),
    ]


def milliseconds(kernel: Kernel, candidate: Candidate, tolerance: float) -> float | str:
    """Median time of a candidate, or why there is none."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    budget = Budget(candidate.height * candidate.width, candidate.slots, candidate.warps, candidate.stages)

    def tile(_: str, surroundings: Surroundings) -> Any:
        return shape_tile(surroundings, candidate.height, candidate.width, budget)

    with forced_tile(tile):
        try:
            results = kernel.run()
        except (OutOfResources, CompilationError) as reason:
            return f"does not fit: {type(reason).__name__}"
        for result, exact in zip(results, kernel.exact, strict=True):
            error = ((result[:1].double() - exact).norm() / exact.norm()).item()
            if not error <= tolerance:
                return f"wrong: relative error {error:.1e}"
        return float(do_bench(kernel.run, warmup=5, rep=25, return_mode="median"))


def climb(kernel: Kernel, tolerance: float, deadline: float) -> list[dict[str, Any]]:
    """Every candidate tried, in order; the first is the one that the table in tiles.py gives."""
    seen: dict[Candidate, float | str] = {kernel.start: milliseconds(kernel, kernel.start, tolerance)}

    def time_of(candidate: Candidate) -> float:
        result = seen[candidate]
        return result if isinstance(result, float) else float("inf")

    best, climbed_from = kernel.start, None
    while best != climbed_from:
        climbed_from = best
        for candidate in climbed_from.neighbours():
            if time.monotonic() > deadline:
                break
            if candidate not in seen:
                seen[candidate] = milliseconds(kernel, candidate, tolerance)
        best = min(seen, key=time_of)
    return [asdict(candidate) | {"result": result} for candidate, result in seen.items()]


def sweep(batch: int, dtype: str, seconds: float) -> list[dict[str, Any]]:
    """One row for each shape and kernel: the default tile, the best one, all that were tried."""
    copy = measure_roofline(torch.device("cuda"), DTYPES[dtype]).copy
    share = seconds / (len(SHAPES) * 3)
    rows = []
    for head_dim, side in SHAPES:
        for kernel in build_kernels(head_dim, side, batch, DTYPES[dtype]):
            tried = climb(kernel, TOLERANCE[dtype], time.monotonic() + share)
            floor = 1e3 * kernel.bytes_moved / copy
            timed = [row for row in tried if isinstance(row["result"], float)]
            best = min(timed, key=lambda row: row["result"], default=None)
            row = {"channels": HEADS * head_dim, "side": side, "kernel": kernel.name, "floor_ms": floor}
            rows.append(row | {"default": tried[0], "best": best, "tried": tried})
            print(describe_row(rows[-1]), flush=True)
    return rows


def describe_row(row: dict[str, Any]) -> str:
    """One line: the default's time, the best tile and its time, and each over the memory floor."""
    head = f"{row['channels']:>4}ch {row['side']:>2}² {row['kernel']:<7}"
    wrong = [t for t in row["tried"] if isinstance(t["result"], str) and t["result"].startswith("wrong")]

    def figure(tried: dict[str, Any] | None) -> str:
        if tried is None or not isinstance(tried["result"], float):
            return str(tried and tried["result"])
        sizes = "/".join(str(size) for size in astuple(Candidate(**{k: tried[k] for k in Candidate.__annotations__})))
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
    print("tiles as height/width/slots/warps/stages")
    rows = sweep(options.batch_size, options.dtype, options.seconds)
    if options.json:
        machine = machine_row(torch.device("cuda"))
        write_json({"machine": machine, "dtype": options.dtype, "rows": rows}, options.json)
    wrong = any(str(tried["result"]).startswith("wrong") for row in rows for tried in row["tried"])
    return FAILED if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
