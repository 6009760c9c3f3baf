import torch
from torch import nn

from acmix.layers.mix import PathMix
from acmix.telemetry.probes.paths import path_layers


class Block(nn.Module):
    """Stands for any block that mixes two paths."""

    def __init__(self, stage: int, mode: str = "learned") -> None:
        super().__init__()
        self.mix = PathMix(mode, stage)


def network() -> nn.Sequential:
    return nn.Sequential(Block(1), nn.Conv2d(3, 3, 1), nn.Sequential(Block(2), Block(2)))


def test_rows_are_in_depth_order_with_names_stages_and_values() -> None:
    model = network()
    with torch.no_grad():
        model[2][0].mix.alpha.fill_(0.75)
        model[2][1].mix.beta.fill_(-0.25)
    assert path_layers(model) == [
        {"layer": "0", "stage": 1, "depth": 1, "alpha": 0.5, "beta": 0.5},
        {"layer": "2.0", "stage": 2, "depth": 2, "alpha": 0.75, "beta": 0.5},
        {"layer": "2.1", "stage": 2, "depth": 3, "alpha": 0.5, "beta": -0.25},
    ]


def test_every_mode_reports_the_weights_in_effect() -> None:
    expected = {
        "attention": (1, 0),
        "convolution": (0, 1),
        "sum": (1, 1),
        "convex": (0.25, 0.75),
        "learned": (0.25, 0.5),
    }
    for mode, weights in expected.items():
        block = Block(1, mode)
        if "alpha" in dict(block.mix.named_parameters()):
            nn.init.constant_(block.mix.alpha, 0.25)
        (row,) = path_layers(block)
        assert (row["alpha"], row["beta"]) == weights
        assert type(row["alpha"]) is type(row["beta"]) is float


def test_a_model_without_blocks_gives_an_empty_list() -> None:
    assert path_layers(nn.Conv2d(3, 3, 1)) == []


def test_wrappers_do_not_change_the_names() -> None:
    model = network()
    plain = path_layers(model)
    assert path_layers(torch.compile(model)) == plain
    assert path_layers(nn.DataParallel(model)) == plain
    model[0] = torch.compile(model[0])
    assert path_layers(model) == plain


def test_a_bare_block_has_a_name() -> None:
    assert path_layers(Block(3))[0]["layer"] == "block"
