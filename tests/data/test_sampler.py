"""The order of images is a function of seed and epoch, cut alike for any number of processes."""

import numpy as np
import pytest

from acmix.data.sampler import TrainOrder, val_plans
from acmix.errors import UserError


def global_batches(order: TrainOrder, epoch: int, start_update: int = 0) -> list[list[int]]:
    """The images of each update, in the order of the slices of all ranks."""
    per_rank = [list(order.plans(epoch, rank, start_update)) for rank in range(order.world_size)]
    updates = len(per_rank[0]) // order.accumulate
    batches = []
    for update in range(updates):
        micros = range(update * order.accumulate, (update + 1) * order.accumulate)
        batches.append([i for m in micros for plans in per_rank for i in plans[m].indices.tolist()])
    return batches


def test_an_epoch_shows_each_image_at_most_once_and_drops_only_the_incomplete_batch() -> None:
    order = TrainOrder(length=103, batch_size=5, world_size=2, accumulate=2, seed=3)
    shown = [index for batch in global_batches(order, 0) for index in batch]
    assert len(shown) == len(set(shown)) == 100 == order.updates_per_epoch * order.global_batch
    assert set(shown) <= set(range(103))


def test_the_global_order_is_the_same_for_any_split_of_the_global_batch() -> None:
    splits = [(24, 1, 1), (12, 2, 1), (12, 1, 2), (8, 3, 1), (4, 3, 2), (2, 4, 3), (1, 2, 12)]
    orders = [TrainOrder(200, batch, world, accumulate, seed=5) for batch, world, accumulate in splits]
    expected = global_batches(orders[0], 4)
    for order in orders[1:]:
        assert global_batches(order, 4) == expected


def test_a_start_in_the_middle_continues_the_same_epoch() -> None:
    order = TrainOrder(length=64, batch_size=4, world_size=2, accumulate=2)
    assert global_batches(order, 1, start_update=2) == global_batches(order, 1)[2:]
    assert global_batches(order, 1, start_update=order.updates_per_epoch) == []


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [TrainOrder(50, 5, seed=seed).epoch_order(epoch)[0].tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_the_order_does_not_change_between_versions() -> None:
    assert TrainOrder(10, 5, seed=0).epoch_order(0)[0].tolist() == [9, 5, 3, 0, 1, 8, 2, 4, 7, 6]


@pytest.mark.parametrize("repeats", [2, 3])
def test_repeated_augmentation_puts_the_copies_side_by_side_and_keeps_the_length(repeats: int) -> None:
    order = TrainOrder(length=50, batch_size=6, repeated_aug=repeats)
    indices, copies = order.epoch_order(0)
    assert len(indices) == len(copies) == 50
    assert len({*zip(indices.tolist(), copies.tolist(), strict=True)}) == 50
    assert np.array_equal(copies, np.arange(50) % repeats)
    images = indices[::repeats]
    assert np.array_equal(indices, np.repeat(images, repeats)[:50])
    assert len(np.unique(images)) == len(images)


def test_fewer_images_than_a_global_batch_are_refused_with_the_numbers() -> None:
    with pytest.raises(UserError, match=r"15 training images .* global batch of 16 .*batch_size 4 × 2 .*accumulate 2"):
        TrainOrder(length=15, batch_size=4, world_size=2, accumulate=2)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [1, 2, 7, 12, 13])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_validation_shows_every_image_on_exactly_one_rank(length: int, world_size: int, batch_size: int) -> None:
    plans = [plan for rank in range(world_size) for plan in val_plans(length, batch_size, rank, world_size)]
    assert sorted(index for plan in plans for index in plan.indices.tolist()) == list(range(length))
    assert all(0 < len(plan.indices) <= batch_size for plan in plans)
