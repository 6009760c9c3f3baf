"""Losses are read while the device goes on working."""

import pytest
import torch

from acmix.engine.on_host import OnHost


def test_the_value_arrives_without_its_graph() -> None:
    value = torch.tensor([1.5, float("nan")], requires_grad=True)
    read = OnHost(2 * value).read()
    assert not read.requires_grad
    torch.testing.assert_close(read, torch.tensor([3.0, float("nan")]), equal_nan=True)


@pytest.mark.gpu
def test_a_value_is_read_before_what_was_queued_after_it_is_done() -> None:
    value = torch.full((2,), 3.0, device="cuda") * 2
    copy = OnHost(value)
    torch.cuda._sleep(2_000_000_000)  # about a second of the device's clock
    done = torch.cuda.current_stream().record_event()
    assert copy.read().tolist() == [6.0, 6.0]
    assert not done.query()
