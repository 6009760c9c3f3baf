"""The path weights and the ablation modes."""

import pytest
import torch

from acmix.layers import PathMix


@pytest.mark.parametrize(
    ("mode", "parameters", "weights"),
    [
        ("attention", [], (1.0, 0.0)),
        ("convolution", [], (0.0, 1.0)),
        ("sum", [], (1.0, 1.0)),
        ("convex", ["alpha"], (0.3, 0.7)),
        ("learned", ["alpha", "beta"], (0.3, 0.6)),
    ],
)
def test_each_mode_has_its_weights_and_only_the_parameters_it_learns(mode, parameters, weights):
    mix = PathMix(mode)
    assert [name for name, _ in mix.named_parameters()] == parameters
    for parameter, value in zip(mix.parameters(), (0.3, 0.6), strict=False):
        parameter.data.fill_(value)
    assert [float(torch.as_tensor(weight).detach()) for weight in mix.weights()] == pytest.approx(weights)


def test_learned_weights_start_at_one_half():
    mix = PathMix()
    assert (float(mix.alpha), float(mix.beta)) == (0.5, 0.5)


def test_mixing_weighs_attention_by_alpha_and_convolution_by_beta():
    mix = PathMix()
    mix.alpha.data.fill_(2.0)
    mix.beta.data.fill_(3.0)
    assert mix(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])).tolist() == [2.0, 3.0]


def test_an_unknown_mode_is_refused_with_the_modes_there_are():
    with pytest.raises(ValueError, match=r"'blend'.*attention, convolution, sum, convex, learned"):
        PathMix("blend")
