import torch

from benchmarks.peak import peak_bytes

MIB = 2**20


def test_the_peak_is_what_lives_at_once_not_what_was_ever_allocated() -> None:
    def step() -> None:
        for _ in range(3):
            first = torch.empty(4 * MIB, dtype=torch.uint8)
            second = torch.empty(8 * MIB, dtype=torch.uint8)
            del first
            third = torch.empty(2 * MIB, dtype=torch.uint8)
            del second, third

    assert peak_bytes(step, torch.device("cpu")) == 12 * MIB


def test_temporaries_inside_an_operation_count() -> None:
    x = torch.randn(256, 256)

    def step() -> None:
        (x @ x.t() @ x).sum()

    assert peak_bytes(step, torch.device("cpu")) >= 2 * x.nbytes
