"""Seeds derived from (seed, epoch, index, ...); a draw never depends on earlier draws."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def stream_seed(*parts: int | str) -> int:
    """A 63-bit seed from the parts and their order, the same on every machine and in every version.

    The first part names the stream: `stream_seed("augment", seed, epoch, index, repeat)`.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & (2**63 - 1)


def seed_generators(seed: int) -> None:
    """Seed the generators that augmentation draws from: Python's, numpy's and torch's on the CPU.

    Unlike `torch.manual_seed`, this leaves the CUDA generators alone.
    """
    random.seed(seed)
    np.random.seed([seed & 0xFFFFFFFF, seed >> 32])
    torch.default_generator.manual_seed(seed)


@contextmanager
def preserved_generators() -> Iterator[None]:
    """Restore the global generators of Python, numpy and torch (CPU) at the end of the block."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])
