"""Randomness that follows from what is being done, never from what was done before."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def stream_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part and its place, the same on every machine and version.

    Name the stream first: `stream_seed("augment", seed, epoch, index, repeat)`.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & (2**63 - 1)


def seed_generators(seed: int) -> None:
    """Seed the generators that augmentation draws from: Python's, numpy's and torch's on the CPU.

    CUDA generators are left alone, unlike with `torch.manual_seed`.
    """
    random.seed(seed)
    np.random.seed([seed & 0xFFFFFFFF, seed >> 32])
    torch.default_generator.manual_seed(seed)


@contextmanager
def preserved_generators() -> Iterator[None]:
    """Put the global generators of Python, numpy and torch (CPU) back as they were on leaving."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block, such as mixup, under its own seed; the global CPU generators are as before afterwards."""
    with preserved_generators():
        seed_generators(seed)
        yield
