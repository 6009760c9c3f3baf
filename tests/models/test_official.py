"""The authors' weights: logits of whole networks, and the strictness of the loader."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.layers import resize_rel_pos_bias_table
from torch import Tensor

from acmix import ACmix, models
from acmix.layers import AttentionPath
from acmix.ops.local_attention.implementations import LOCAL_ATTENTION

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CONSTRUCTED = ("relative_position_index", "num_batches_tracked", "attn_mask")
EAGER = [impl for impl in LOCAL_ATTENTION.names if impl not in ("cpp", "triton")]


def draw(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weights that the golden logits were made with, by name."""
    generator = np.random.default_rng(zlib.crc32(key.encode()))
    if key.endswith("running_var"):
        return generator.uniform(0.5, 1.5, shape)
    if key.endswith("running_mean"):
        return 0.1 * generator.standard_normal(shape)
    if key.endswith(("rate1", "rate2")):
        return generator.uniform(0.3, 0.9, shape)
    if key.endswith("relative_position_bias_table"):
        return 0.2 * generator.standard_normal(shape)
    if len(shape) >= 2:
        return generator.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    if key.endswith("weight"):
        return 1 + 0.1 * generator.standard_normal(shape)
    return 0.1 * generator.standard_normal(shape)


def official_weights(name: str) -> tuple[dict[str, Tensor], Tensor]:
    """The authors' state dict of one golden network, and its logits."""
    golden = np.load(GOLDEN / f"{name}.npz")
    keys = [str(key) for key in golden["keys"]]
    shapes = [tuple(json.loads(str(shape))) for shape in golden["shapes"]]
    weights = {
        key: torch.zeros(shape) if key.endswith(CONSTRUCTED) else torch.from_numpy(np.asarray(draw(key, shape)))
        for key, shape in zip(keys, shapes, strict=True)
    }
    return weights, torch.from_numpy(golden["logits"])


@pytest.mark.parametrize(
    ("name", "network", "impl"),
    [
        *(("resnet26", "acmix_resnet26", impl) for impl in ("auto", *EAGER)),
        ("swin_tiny", "acmix_swin_tiny", "auto"),
        ("swin_tiny", "acmix_swin_tiny", "reference"),
    ],
)
def test_logits_match_the_authors_network(name, network, impl):
    weights, logits = official_weights(name)
    model = timm.create_model(network, impl=impl).double().eval()
    models.load_official(model, weights)
    images = torch.from_numpy(np.random.default_rng(7).standard_normal((2, 3, 224, 224)))
    with torch.no_grad():
        got = model(images)
    assert float((got - logits).norm() / logits.norm()) < 1e-6


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # in timm
def test_the_authors_position_biases_are_interpolated_for_another_size(capsys):
    weights, _ = official_weights("swin_tiny")
    model = timm.create_model("acmix_swin_tiny", img_size=(96, 192))  # last stages 6×12, 3×6
    models.load_official(model, weights)
    for block, windows in ((0, (6, 7)), (1, (3, 6))):
        stage, official = model.layers[2 + block].blocks[1].acmix, f"layers.{2 + block}.blocks.1.attn"
        table = weights[f"{official}.relative_position_bias_table"].float()
        assert stage.attention.window_size == windows
        shape = tuple(stage.attention.relative_position_bias_table.shape)
        expected = resize_rel_pos_bias_table(table, new_window_size=windows, new_bias_shape=shape)
        torch.testing.assert_close(stage.attention.relative_position_bias_table.detach(), expected)
    assert "8 tables of position biases are for other windows; interpolated" in capsys.readouterr().err


def block_weights(channels: int = 8, heads: int = 2) -> dict[str, Tensor]:
    head_dim = channels // heads
    shapes = {f"conv{i}.weight": (channels, channels, 1, 1) for i in (1, 2, 3)}
    shapes |= {f"conv{i}.bias": (channels,) for i in (1, 2, 3)}
    shapes |= {"conv_p.weight": (head_dim, 2, 1, 1), "conv_p.bias": (head_dim,), "fc.weight": (9, 3 * heads, 1, 1)}
    shapes |= {"dep_conv.weight": (channels, 9, 3, 3), "rate1": (1,), "rate2": (1,)}
    return {key: torch.randn(shape) for key, shape in shapes.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: {"model": weights, "epoch": 3},
        lambda weights: {"state_dict": weights, "optimizer": {}},
        lambda weights: {"state_dict": {f"module.{key}": value for key, value in weights.items()}},
    ],
    ids=["model", "state_dict", "module prefix"],
)
def test_weights_are_found_inside_a_checkpoint(wrap):
    weights = block_weights()
    plain, wrapped = ACmix(8, 8, heads=2), ACmix(8, 8, heads=2)
    models.load_official(plain, weights)
    models.load_official(wrapped, wrap(weights))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), wrapped.parameters(), strict=True))


def test_every_wrong_key_is_listed_and_nothing_is_changed():
    block = ACmix(8, 8, heads=2)
    before = {key: value.clone() for key, value in block.state_dict().items()}
    weights = block_weights()
    del weights["rate1"]
    weights["fc.weight"] = torch.zeros(9, 12, 1, 1)
    weights |= {"fc.bias": torch.zeros(9), "conv_q.bias": torch.zeros(4)}
    with pytest.raises(ValueError, match="missing: rate1") as caught:
        models.load_official(block, weights)
    for problem in ("unexpected: fc.bias", "unexpected: conv_q.bias", "shape: fc.weight is (9, 12, 1, 1)"):
        assert problem in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in block.state_dict().items())


def test_a_bias_that_the_authors_blocks_never_save_is_dropped_only_if_it_is_zero():
    weights = block_weights()
    models.load_official(ACmix(8, 8, heads=2), weights | {"dep_conv.bias": torch.zeros(8)})
    with pytest.raises(ValueError, match=r"unexpected: dep_conv\.bias"):
        models.load_official(ACmix(8, 8, heads=2), weights | {"dep_conv.bias": torch.ones(8)})


@pytest.mark.parametrize("options", [{"mix": "sum"}, {"mix": "attention"}, {"shift": "fixed"}, {"shift": "full"}])
def test_an_arm_without_a_place_for_every_weight_is_refused(options):
    with pytest.raises(ValueError, match=r"unexpected: |no counterpart"):
        models.load_official(ACmix(8, 8, heads=2, **options), block_weights())


def test_what_is_no_state_dict_or_no_network_of_ours_is_refused():
    with pytest.raises(ValueError, match="no tensors: epoch"):
        models.load_official(ACmix(8, 8), {"epoch": 3})
    with pytest.raises(ValueError, match="no tensors: a, b, c, d, e, … 7 in all"):
        models.load_official(ACmix(8, 8), {"model": dict.fromkeys("abcdefg", 0)})
    for odd in (torch.zeros(1).to_sparse(), torch.zeros(1, device="meta"), torch.zeros(1, dtype=torch.complex64)):
        with pytest.raises(ValueError, match="sparse, quantised, complex or on the meta device: rate1"):
            models.load_official(ACmix(8, 8, heads=2), block_weights() | {"rate1": odd})
    with pytest.raises(ValueError, match="a list, not names and tensors"):
        models.load_official(ACmix(8, 8), [torch.zeros(1)])
    with pytest.raises(ValueError, match="these names are no text: 1"):
        models.load_official(ACmix(8, 8), {1: torch.zeros(1)})
    with pytest.raises(ValueError, match="takes ACmix, ACmixResNet or ACmixSwin, not Linear"):
        models.load_official(torch.nn.Linear(2, 2), {})


@pytest.mark.parametrize(
    ("options", "path"),
    [({"attention": AttentionPath(2, 4)}, "AttentionPath"), ({"mix": "convolution"}, "no attention")],
)
def test_a_block_whose_attention_the_authors_do_not_have_is_refused(options, path):
    with pytest.raises(ValueError, match=rf"{path}.* no counterpart.* LocalAttention or WindowAttention"):
        models.load_official(ACmix(8, 8, heads=2, **options), block_weights())
