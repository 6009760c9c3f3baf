"""Both paths in one operation: what it refuses. That it computes their sum is held in tests/layers/test_block.py."""

import pytest
import torch

from acmix.ops import local_mix

BAD_CALLS = {
    "thirds": ({"qkv": torch.zeros(1, 6, 6, 25)}, r"for 25 channels of q, k and v together"),
    "no map": ({"qkv": torch.zeros(6, 6, 24)}, r"qkv must be a floating-point map .*\(6, 6, 24\)"),
    "integers": ({"qkv": torch.zeros(1, 6, 6, 24).long()}, r"qkv must be a floating-point map .*torch\.int64"),
    "empty": ({"qkv": torch.zeros(1, 0, 6, 24)}, r"a map of 0×6 pixels is empty"),
    "width": ({"position_weight": torch.zeros(3, 2)}, r"got \(8, 6, 3, 3\) and \(3, 2\)"),
    "coordinates": ({"position_weight": torch.zeros(4, 1)}, r"got \(8, 6, 3, 3\) and \(4, 1\)"),
    "square": ({"weight": torch.zeros(8, 6, 1, 3)}, r"weight must be .* got \(8, 6, 1, 3\)"),
    "outputs": ({"weight": torch.zeros(4, 6, 3, 3)}, r"weight must be .* got \(4, 6, 3, 3\)"),
    "maps": ({"weight": torch.zeros(8, 3, 3, 3)}, r"weight must be .* got \(8, 3, 3, 3\)"),
    "scalar": ({"alpha": torch.ones(2)}, r"alpha a scalar, got .*\(2,\)"),
    "one device": ({"weight": torch.zeros(8, 6, 3, 3, device="meta")}, r"tensors on cpu and on meta: move"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_call_that_cannot_work_says_why_and_what_to_do(changes: dict[str, torch.Tensor], message: str) -> None:
    arguments = {
        "qkv": torch.zeros(1, 6, 6, 24),
        "position_weight": torch.zeros(4, 2),
        "weight": torch.zeros(8, 6, 3, 3),
        "alpha": torch.tensor(0.5),
    }
    with pytest.raises(ValueError, match=message):
        local_mix(**(arguments | changes), kernel_size=3)
