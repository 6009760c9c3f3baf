"""Seeds that depend on names only, and generators that are left as they were found."""

import random

import numpy as np
import torch

from acmix.data.seeding import preserved_generators, seed_generators, stream_seed


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_a_stream_seed_is_the_same_on_every_machine_and_version() -> None:
    assert stream_seed("order", 0, 1) == 1953072085611776627
    assert stream_seed() == 3797230976420062948


def test_a_stream_seed_depends_on_every_part_its_place_and_its_type() -> None:
    variants = [
        ("a", 1, 2),
        ("a", 2, 1),
        ("b", 1, 2),
        ("a", 12),
        ("a", "1", 2),
        ("a", 1, 2, 0),
        ("a1", 2),
        ("a", -1, 2),
    ]
    assert len({stream_seed(*parts) for parts in variants}) == len(variants)
    assert all(0 <= stream_seed("x", i) < 2**63 for i in range(1000))


def test_seeding_fixes_python_numpy_and_torch() -> None:
    with preserved_generators():
        seed_generators(2**63 - 1)
        first = draws()
        seed_generators(2**63 - 1)
        assert draws() == first
        seed_generators(2**63 - 2)
        assert all(a != b for a, b in zip(draws(), first, strict=True))


def test_a_block_may_draw_and_seed_without_changing_the_global_generators() -> None:
    with preserved_generators():
        seed_generators(1)
        expected = draws()
        seed_generators(1)
        with preserved_generators():
            draws()
            seed_generators(7)
        assert draws() == expected
