"""Implementations of the operations for CPUs: eager (dense, halo, folded) and compiled ones."""
