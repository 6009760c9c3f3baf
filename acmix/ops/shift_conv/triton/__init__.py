"""The folded convolution path as Triton kernels, for CUDA devices.

`limits` says what they can run and imports no Triton; `kernels`, loaded with the first call, does.
"""
