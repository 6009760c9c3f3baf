"""A fault in the code that PyTorch's compiler writes for a CPU, mended in this process before a network is compiled."""

from functools import cache
from typing import Any


@cache
def keep_stores_inside() -> None:
    """Let Inductor's sums store no more of a vector than the row still has room for (pytorch #196681).

    Where the vectors lie along one loop, the sum runs along another, and a third is between them, PyTorch 2.14 takes
    the stores of whole vectors for the rest of a row too. They go over the next row, or past the end of the memory.
    """
    import torch.compiler.config as settings
    from torch._inductor.codegen.cpp import CppKernelProxy, CppTile2DKernel, CppVecKernel

    proxies: Any = CppKernelProxy
    aggregate = getattr(proxies, "aggregate_reduction_buffers", None)
    if aggregate is None:  # a version of PyTorch that writes this code otherwise
        return

    def with_the_rest(proxy: Any, apart: bool, loop: Any) -> None:
        """`apart`: whether the rest of `loop` has stores of its own."""
        kernel, loops = proxy.kernels[0], proxy.loop_nest.loops
        if isinstance(kernel, CppVecKernel):
            outer = kernel.tiling_indices[0] if isinstance(kernel, CppTile2DKernel) else kernel.tiling_idx
            apart = loops[-1].is_reduction and not loops[outer].is_reduction
        aggregate(proxy, apart, loop)

    proxies.aggregate_reduction_buffers = with_the_rest
    settings.cache_key_tag += " stores kept inside"  # what a cache holds from before is not taken
