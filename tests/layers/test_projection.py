"""What an attention path says of its projection, and what the block makes of it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from acmix import ACmix
from acmix.layers import AttentionPath


class PooledAttention(AttentionPath):
    """Every pixel attends to all of a map of half the size; the convolution path gets q alone."""

    @property
    def shared_maps(self):
        return self.heads

    def reduce(self, x):
        return F.avg_pool2d(x, 2, ceil_mode=True)

    def share(self, q, k, v, height, width):
        return q, q[:, :0], q[:, :0]

    def attend(self, q, k, v):
        size = q.shape[2:]
        q, k, v = (m.unflatten(1, (self.heads, self.head_dim)).flatten(3).mT for m in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).mT.flatten(1, 2).unflatten(2, size)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_k_and_v_are_projected_from_what_the_path_reduces_and_q_from_the_input(channels_last, wrapped):
    torch.manual_seed(0)
    block = ACmix(6, 8, heads=2, attention=PooledAttention(2, 4)).double()
    if wrapped:
        block.qkv = nn.Sequential(block.qkv)
    layer = block.qkv[0] if wrapped else block.qkv
    x = torch.randn(2, 6, 5, 7).double()
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    assert layer.out_features == 24
    assert block.convolution.fc_weight.shape == (9, 2)
    full, half = (F.conv2d(m, layer.weight[:, :, None, None], layer.bias) for m in (x, block.attention.reduce(x)))
    q, k, v = full[:, :8], half[:, 8:16], half[:, 16:]
    convolved = block.convolution(q, q[:, :0], q[:, :0])
    torch.testing.assert_close(block(x), 0.5 * block.attention(q, k, v) + 0.5 * convolved)
