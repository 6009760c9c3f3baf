"""Random numbers that are a function of (seed, epoch, index, repeat), for whole batches at once.

Each sample has its own SplitMix64 generator (Steele, Lea and Flood, 2014), whose n-th number is computed without those
before it. Plain integer arithmetic: the same on every machine and in every version.
"""

import numpy as np

from acmix.data.seeding import stream_seed

_STEP = np.uint64(0x9E3779B97F4A7C15)  # 2^64 divided by the golden ratio, made odd
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31, _S11 = (np.uint64(bits) for bits in (27, 30, 31, 11))


class Draws:
    """Numbers of the samples of a batch.

    indices, repeats: (B,) integers ≥ 0
    """

    def __init__(self, seed: int, epoch: int, indices: np.ndarray, repeats: np.ndarray) -> None:
        start = np.full(1, stream_seed("batched", seed, epoch), dtype=np.uint64)
        self._states = _mixed(_mixed(start + indices.astype(np.uint64) * _STEP) + repeats.astype(np.uint64) * _STEP)

    def uniform(self, first: int, count: int, chosen: np.ndarray | slice = slice(None)) -> np.ndarray:
        """The numbers from `first` on, (count, B) float64 in [0, 1), of the chosen samples of the batch."""
        steps = np.arange(first + 1, first + count + 1, dtype=np.uint64)[:, None] * _STEP
        return (_mixed(self._states[chosen] + steps) >> _S11) * 2.0**-53

    def seeds(self, number: int) -> list[int]:
        """The `number`-th numbers as seeds of 63 bits, one for each sample."""
        values = _mixed(self._states + np.full(1, number + 1, dtype=np.uint64) * _STEP)
        return [int(value) for value in values >> np.uint64(1)]


def whole(uniform: np.ndarray, count: np.ndarray | int) -> np.ndarray:
    """Uniform numbers in [0, 1) → integers from 0 to `count - 1`."""
    return (uniform * count).astype(np.int64)


def _mixed(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> _S30)) * _FIRST
    values = (values ^ (values >> _S27)) * _SECOND
    return values ^ (values >> _S31)
