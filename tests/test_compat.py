"""`acmix.compat`: the authors' signature and their weights."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

import acmix
from acmix.compat import ACmix
from acmix.models import load_official

GOLDEN = Path(__file__).resolve().parent / "golden"


@pytest.mark.parametrize("name", ["block_a", "block_b"])
def test_it_takes_the_authors_keywords_and_weights_and_gives_their_outputs(name):
    golden = np.load(GOLDEN / f"{name}.npz")
    config = json.loads(str(golden["config"]))
    block = ACmix(
        in_planes=config["in_channels"],
        out_planes=config["out_channels"],
        kernel_att=config["kernel_att"],
        head=config["heads"],
        kernel_conv=config["kernel_conv"],
        stride=config["stride"],
        dilation=1,
    ).double()
    load_official(block, {key[6:]: torch.from_numpy(golden[key]) for key in golden.files if key.startswith("param/")})
    with torch.no_grad():
        y = block(torch.from_numpy(golden["x"]))
    torch.testing.assert_close(y, torch.from_numpy(golden["y"]), rtol=1e-6, atol=1e-6)


def test_positions_mean_what_they_mean_in_the_authors_signature():
    block = ACmix(16, 24, 5, 3, 3, 2)
    assert (block.attention.kernel_size, block.heads, block.convolution.kernel_size, block.stride) == (5, 3, 3, 2)
    assert isinstance(block, acmix.ACmix)
    assert pickle.loads(pickle.dumps(block)).heads == 3  # noqa: S301 - of our own making, and in memory
