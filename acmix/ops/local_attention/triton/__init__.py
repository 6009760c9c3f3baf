"""Local attention as Triton kernels, for CUDA devices.

Nothing here imports Triton before a kernel is asked for, so the package can be imported where Triton is not installed.
"""
