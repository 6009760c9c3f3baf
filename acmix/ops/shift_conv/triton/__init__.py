"""The folded convolution path as Triton kernels, for CUDA devices.

`kernels`, loaded with the first call, imports Triton; nothing else does.
"""
