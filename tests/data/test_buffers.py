"""Memory that is lent out again only when nothing refers to what was in it."""

import gc

import torch

from acmix.data.buffers import Buffers


def test_memory_is_used_again_once_its_tensor_is_gone_and_not_before() -> None:
    buffers = Buffers()
    first = buffers.empty((2, 3))
    place = first.data_ptr()
    view = first.fill_(7)[0]
    del first
    second = buffers.empty((2, 3)).fill_(0)
    assert second.data_ptr() != place
    assert view.tolist() == [7, 7, 7], "a view keeps the memory"
    del view
    gc.collect()
    assert buffers.empty((3, 2)).data_ptr() == place, "of the same size, whatever the shape"


def test_what_autograd_has_saved_keeps_its_memory() -> None:
    buffers = Buffers()
    weight = torch.ones(4, requires_grad=True)
    images = buffers.empty((4,)).fill_(3)
    loss = (weight * images).sum()
    del images
    buffers.empty((4,)).fill_(-1)
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [3, 3, 3, 3]


def test_only_some_memory_is_kept() -> None:
    buffers = Buffers()
    held = [buffers.empty((8,)) for _ in range(10)]
    held.clear()
    assert len(buffers._free) == 3
