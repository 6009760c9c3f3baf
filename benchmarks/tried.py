"""Why targets were missed and what was tried for them, told on the page beside the figures."""

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch

from benchmarks.suite import Target

_NARROW = (
    "heads of 4 to 16 channels fill a quarter of a vector to a whole one, and at width 4 the softmax costs as much as "
    "the products. Kept: packing pixels with all that the loop needs in registers; four heads of an image together; "
    "memory that is not given back, which spares both networks 11 to 16 % of a step. No faster: a few images at a time "
    "through both paths, so that q, k and v stay in the cache; projections as matrix products (they are 1×1 "
    "convolutions)"
)
_SCALING = (
    "0.3 to 0.5 ms of an operation's forward and backward pass are PyTorch's dispatch and autograd on one thread, a "
    "fifth of the time at 512x7; two cores of an AMD EPYC give a matrix product 1.92 times the rate of one. Kept: "
    "PyTorch's own OpenMP threads in place of a pool; heads that share a cache line on one thread. Not kept: "
    "torch.autograd.Function in place of operations of the dispatcher, which saves 0.15 to 0.17 ms of them, because "
    "compiled graphs, transforms and counters need those"
)
_COMPILED = (
    "Inductor's loops for batch norm, ReLU and changes of layout take longer than PyTorch's kernels. No faster: batch "
    "norm as one operation that Inductor leaves alone (1.15), max pooling as one (1.12 to 1.15), "
    "layout_optimization=False (1.08)"
)
_SHARDS = (
    "decoding and resizing take what is left. Kept: slots of shared memory that are used again, crops as arrays until "
    "they are a batch. No faster: threads in place of processes (1,145 µs an image, 1,135 before), planar resizing; "
    "little: fast DCT and upsampling (522 µs, 538 before), optimised Huffman tables (532, for files that take 75 % "
    "longer to write)"
)
_AUTHORS = (
    "ours takes the same in every process; theirs, mostly page faults, depends on what the allocator has kept: 8 to 33 "
    "times ours in a process that begins with that size, with memory kept 14, 12, 8.6 and 5.3 times on one thread"
)
_TRAINER = (
    "on two threads the run prepares its batches on the cores on which it computes, while the bare loop holds them in "
    "memory. Kept: loss and norm of the gradients are read a step later; batches by one thread ahead; probes every "
    "tenth step, 0.6 % of the time. Whether the rest of the difference is more than the spread is open"
)
_TRIED = {
    "narrow_train*": _NARROW,
    "*_scaling": _SCALING,
    "resnet26_compiled_over_eager_train": _COMPILED,
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
