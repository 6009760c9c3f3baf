"""What the machine can do at best, measured in the same run: matrix products and copies."""

from dataclasses import dataclass

import torch

from benchmarks.timing import time_in_turn, use_threads


@dataclass(frozen=True)
class Roofline:
    """operations: floating-point operations per second of a large matrix product, a multiply-add being two of them;
    copy: bytes read and written per second."""

    operations: float
    copy: float

    def __str__(self) -> str:
        return f"{1e-9 * self.operations:,.0f} GFLOP/s, {1e-9 * self.copy:,.1f} GB/s"

    def seconds(self, multiply_adds: float, traffic: float) -> float:
        """The time that neither arithmetic nor memory traffic (bytes) could undercut."""
        return max(2 * multiply_adds / self.operations, traffic / self.copy)


def measure_roofline(device: torch.device, dtype: torch.dtype, threads: int = 1) -> Roofline:
    """Time a square matrix product in `dtype` and a copy far larger than the caches, on so many CPU threads."""
    use_threads(threads)
    size, copied = (8192, 2**30) if device.type == "cuda" else (1024, 2**27)  # elements a side, bytes
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.zeros(copied, device=device, dtype=torch.uint8)
    target = torch.zeros_like(source)

    def multiply() -> None:
        torch.mm(a, b, out=product)

    def copy() -> None:
        target.copy_(source)

    for warm_up in (multiply, copy):
        warm_up()
    multiplied, copying = time_in_turn([multiply, copy], device, seconds=0.5)
    # the best, not the median: a roof is what can be reached
    return Roofline(operations=2 * size**3 / min(multiplied.values), copy=2 * copied / min(copying.values))
