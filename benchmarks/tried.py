"""Why targets were missed and what was tried for them, told on the page beside the figures."""

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch

from benchmarks.suite import Target

_NARROW = (
    "heads of 4 to 16 channels fill a quarter of a vector to a whole one, and at width 4 the softmax costs as much as "
    "the products. Kept: packing pixels with all that the loop needs in registers; four heads of an image together; "
    "memory that is not given back, which spares both networks 11 to 16 % of a step. No faster: a few images at a "
    "time through both paths, so that q, k and v stay in the cache; projections as matrix products (they are 1×1 "
    "convolutions); q, k and v packed together, pixel by pixel, where memory has them in a row (0.96 to 1.3 times the "
    "time of the convolution's forward pass)"
)
_SCALING = (
    "0.3 to 0.5 ms of an operation's forward and backward pass are PyTorch's dispatch and autograd on one thread, a "
    "fifth of the time at 512x7; two cores of an AMD EPYC give a matrix product 1.92 times the rate of one. Kept: "
    "PyTorch's own OpenMP threads in place of a pool; heads that share a cache line on one thread; in eager mode "
    "torch.autograd.Function in place of operations of the dispatcher, which saves 0.15 ms of them. No faster: the "
    "convolution's two weights folded by one such function (0.15 ms, 0.13 by PyTorch's operations)"
)
_COMPILED = (
    "Inductor's loops for batch norm, ReLU and changes of layout take longer than PyTorch's kernels. Kept: q, k and v "
    "in five axes where they wait for the backward pass, since Inductor copies what has four into the order of a map's "
    "channels (1.12, 1.17 before). No faster: batch norm as one operation that Inductor leaves alone, max pooling as "
    "one (each 1.12 to 1.15 before that), layout_optimization=False (1.11, and 1.11 without it, 16 steps each, twice), "
    "two passes for a variance in place of Welford's (0.97 to 1.02 times the time without, 16 steps each, twice)"
)
_COMPILED_SWIN = (
    "a percent or two, as much as one process differs from another: by a timer, 12 s each in one process, inference "
    "took 1.00 ± 0.03 times eager's and training 0.97 ± 0.03. No faster: freezing (1.02 in inference), "
    "layout_optimization=False (1.03, and 0.97 in training), matrices that are not packed (1.02), Inductor's pattern "
    "matcher left out (0.97 in training)"
)
_SHARDS = (
    "decoding and resizing take what is left. Kept: slots of shared memory that are used again, crops as arrays until "
    "they are a batch. No faster: threads in place of processes (1,145 µs an image, 1,135 before), planar resizing; "
    "little: fast DCT and upsampling (522 µs, 538 before), optimised Huffman tables (532, for files that take 75 % "
    "longer to write)"
)
_AUTHORS = (
    "ours takes the same in every process; theirs, mostly page faults, depends on what the allocator has kept: with "
    "all memory kept it takes 14, 12, 8.6 and 5.3 times ours on one thread, in the order of the rows. Kept: both "
    "paths by one operation in place; sums over spans of 32 channels (attention 1.2 times as fast without AVX-512); "
    "torch.autograd.Function in eager mode, which spares a tenth of a millisecond. What is left at 512x7 are two "
    "matrix products, two thirds of the time, near the roof"
)
_TRAINER = (
    "on two threads the run prepares its batches on the cores on which it computes, while the bare loop holds them in "
    "memory. Kept: loss and norm of the gradients are read a step later; batches by one thread ahead; probes every "
    "tenth step, 0.6 % of the time. Whether the rest of the difference is more than the spread is open"
)
_GPU_NETWORK = (
    "the step waits for Python, on a host whose cores are slow. Kept, in turn (by a timer and PyTorch's profiler, 8 "
    "steps each): 112 ms at first, 79 of them kernels, where the largest cost that is no matrix product was how q, k "
    "and v came to cuDNN's grouped convolution and from it: copies, changes between NCHW and NHWC and batch norm in "
    "NCHW, 25 ms; 79 ms, 52 of them kernels, with the convolution path in Triton, which reads the maps where the "
    "projection puts them, and both paths in one operation; 66 ms with faster tiles, of 340 tried, and "
    "torch.autograd.Function in eager mode. No faster: densified convolution by cuDNN (1.5 ms for the path at 64x56, "
    "1.3 in Triton), the paper's two steps (6.8 ms). Not tried: a CUDA graph of the step, which would take Python out "
    "of it"
)
_GPU_ATTENTION = (
    "the three kernels take 0.81 ms, 5.6 times the floor; the rest of 1.36 ms is Python's. A tile of 4x8 queries "
    "meets 160 keys for each, 49 of them in its window, and all cost an exponential. Tried: 15 tiles for each kernel, "
    "of which one warp with 4x8 queries and three steps in flight was the fastest (two: 0.86 ms)"
)
_GPU_SWIN = (
    "refused because cuDNN rounds to TF32, in our densified convolution as in plain PyTorch's, whose error is what "
    "allows 4.6e-4 there: with operands rounded so, computed on a CPU, that gradient errs 3e-4, in float32 1e-6. The "
    "check now turns TF32 off, and has not been run on a GPU since. By a timer, 8 steps each: 121 ms with cuDNN's "
    "grouped convolution, 94 ms with Triton's for every number of heads, timm's 60 ms. Since then Triton computes up "
    "to 4 heads, cuDNN's densified convolution 5 to 8, the paper's two steps more: each was the fastest of four there "
    "by itself"
)
_GPU_BATCH = (
    "batch norm and ReLU keep their maps whatever the block does. Tried: the paths one after the other (128 images "
    "take 8.6 GiB, weights and all), both in one operation, which keeps q, k, v, the attended map and its log-sum-exp "
    "(7.3 GiB; torchvision's ResNet-50 takes 5.6)"
)
_TRIED = {
    "resnet50": _GPU_NETWORK,
    "attention_floor": _GPU_ATTENTION,
    "swin_tiny_rate": _GPU_SWIN,
    "resnet50_batch": _GPU_BATCH,
    "narrow_train*": _NARROW,
    "*_scaling": _SCALING,
    "resnet26_compiled*": _COMPILED,
    "swin_tiny_compiled*": _COMPILED_SWIN,
    "loader_shards": _SHARDS,
    "trainer": _TRAINER,
    "block_*": _AUTHORS,
}
"""Pattern of targets' keys → the text."""


def with_what_was_tried(targets: Sequence[Target]) -> tuple[Target, ...]:
    """The targets, each with its text where there is one."""
    return tuple(
        replace(target, tried=next((text for key, text in _TRIED.items() if fnmatch(target.key, key)), ""))
        for target in targets
    )
