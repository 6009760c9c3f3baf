"""What the machine can do at best, measured in the same run: matrix products and copies."""

from dataclasses import dataclass

import torch

from benchmarks.timing import time_in_turn


@dataclass(frozen=True)
class Roofline:
    """matmul: multiply-adds per second of a large matrix product; copy: bytes read and written per second."""

    matmul: float
    copy: float

    def seconds(self, multiply_adds: float, traffic: float) -> float:
        """The time that neither arithmetic nor memory traffic (bytes) could undercut."""
        return max(multiply_adds / self.matmul, traffic / self.copy)


def measure_roofline(device: torch.device, dtype: torch.dtype) -> Roofline:
    """Time a square matrix product in `dtype` and a copy far larger than the caches."""
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
    return Roofline(matmul=size**3 / min(multiplied.values), copy=2 * copied / min(copying.values))
