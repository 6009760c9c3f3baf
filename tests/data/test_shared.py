"""Memory shared with loader processes: used again when its batch is gone, never before."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from acmix.config import Config
from acmix.data.loader import Data, build_data
from acmix.data.reader import Read
from acmix.data.shared import Slot, Slots

MakeConfig = Callable[..., Config]


@pytest.fixture
def data(make_config: MakeConfig) -> Data:
    settings = {"data__batch_size": 16, "data__num_workers": 2, "data__prefetch_factor": 1}
    return build_data(make_config(**settings, data__loader="workers"))


def read(number: int) -> Any:
    blank: Any = None
    return Read(Slot(number, (2, 3)), blank, blank, blank, [])  # type: ignore[arg-type]


def test_batches_that_are_kept_hold_their_images_while_others_are_read(data: Data) -> None:
    kept = [(batch, batch.images.clone()) for [batch] in data.train.epoch(0)]
    assert len(kept) == data.train.updates_per_epoch > 50  # far more than there are slots
    assert all(torch.equal(batch.again().images, images) for batch, images in kept)


def test_passes_that_are_broken_off_lose_no_memory_and_change_no_image(data: Data) -> None:
    images: Any = data.train.images
    for epoch in range(4):
        next(data.train.epoch(epoch))
    broken = [batch.images for [batch], _ in zip(data.train.epoch(4), range(6), strict=False)]
    fresh = [batch.images for [batch], _ in zip(data.train.epoch(4), range(6), strict=False)]
    assert all(map(torch.equal, broken, fresh))
    assert len(images.pool._slots._free) + len(images.pool._slots._sent) >= len(images.pool._slots.rows) - 2


def test_a_slot_is_assigned_again_only_when_no_tensor_of_it_is_left() -> None:
    slots = Slots(2, 6)
    plans = slots.assigned(["a", "b", "c", "d"])
    (_, first), (_, second), (_, third) = next(plans), next(plans), next(plans)
    assert {first, second} == {0, 1}
    assert third is None
    part = slots.taken(read(first)).pixels[1:]
    assert not slots._free
    del part
    assert next(plans) == ("d", first)


def test_what_was_sent_in_a_pass_that_ended_early_is_free_in_the_next() -> None:
    slots = Slots(1, 6)
    assert next(slots.assigned("a")) == ("a", 0)
    assert next(slots.assigned("b")) == ("b", 0)
    lent = slots.taken(read(0)).pixels
    assert next(slots.assigned("c")) == ("c", None)
    assert lent.shape == (2, 3)
