"""The forward pass before a run: what it refuses, and that it changes nothing."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from acmix.config import Config
from acmix.engine.proof import memory_explained, prove
from acmix.errors import UserError
from acmix.process.distributed import Distributed

ROOT = Path(__file__).resolve().parents[2]
CLASSES = 5


class Net(nn.Module):
    """Convolution, batch norm, dropout, a classifier; `end` makes the output from pooled features and logits."""

    def __init__(self, end: Callable[[Tensor, Tensor], object] = lambda features, logits: logits) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, stride=4, padding=1), nn.BatchNorm2d(4)
        self.drop, self.fc, self.end = nn.Dropout(0.5), nn.Linear(4, CLASSES), end

    def forward(self, x: Tensor) -> object:
        features = self.bn(self.conv(x)).mean((2, 3))
        return self.end(features, self.fc(self.drop(features)))


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def config_of(**sections: dict) -> Config:
    base: dict[str, dict] = {
        "model": {"name": "mine"}, "data": {"dataset": "digits", "image_size": 8, "batch_size": 4},
        "schedule": {"epochs": 1}, "run": {"device": "cpu"},
    }  # fmt: skip
    return Config.model_validate({key: base.get(key, {}) | sections.get(key, {}) for key in {**base, **sections}})


def refusal(network: nn.Module, /, *, training: bool = False, **sections: dict) -> str:
    config = config_of(**sections)
    with pytest.raises(UserError) as caught:
        prove(network, config, CLASSES, Distributed.start(config.run), training=training)
    return str(caught.value)


@pytest.mark.parametrize("amp", ["none", "bf16"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_modes_statistics_weights_and_generators_stay_as_they_were(amp: str, channels_last: bool) -> None:
    model = Net().train()
    model.bn.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index]
    config = config_of(precision={"amp": amp, "channels_last": channels_last})
    prove(model, config, CLASSES, Distributed.start(config.run), training=True)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert np.array_equal(states[2], np.random.get_state()[1])  # type: ignore[index]
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("end", "parts"),
    [
        (lambda features, logits: (logits, features), ["gives a tuple", "logits", "(2, 5)"]),
        (lambda features, logits: {"logits": logits}, ["gives a dict"]),
        (lambda features, logits: logits[:, :3], ["gives 3 numbers for each image", "num_classes"]),
        (lambda features, logits: features[:, :, None, None], ["gives (2, 4, 1, 1)", "global_pool"]),
        (lambda features, logits: logits.mean(), ["gives ()"]),
    ],
    ids=["tuple", "dict", "width", "map", "scalar"],
)
def test_an_output_that_is_no_logits_is_refused(end: Callable, parts: list[str]) -> None:
    message = refusal(Net(end))
    assert message.startswith("model.name: mine gives")
    assert all(part in message for part in parts), message


def test_a_fault_in_a_users_forward_pass_is_named_with_its_line() -> None:
    message = refusal(Net(lambda features, logits: logits.no_such_thing))
    assert "AttributeError" in message
    assert f"(test_proof.py, line {_line_of('logits.no_such_thing)')})" in message
    assert "\n" not in message


def _line_of(text: str) -> int:
    return next(number for number, line in enumerate(Path(__file__).read_text().splitlines(), 1) if text in line)


def test_channels_that_the_network_does_not_take_name_in_chans() -> None:
    assert refusal(Net(), model={"name": "mine", "kwargs": {"in_chans": 1}}).startswith("model.kwargs.in_chans: ")


def test_batch_norm_over_a_single_value_is_refused_for_training_alone() -> None:
    single = {"dataset": "digits", "image_size": 4, "batch_size": 1}
    assert refusal(Net(), training=True, data=single).startswith("data.batch_size: with one image")
    for data, training in ((single, False), (single | {"image_size": 8}, True), (single | {"batch_size": 2}, True)):
        config = config_of(data=data)
        prove(Net(), config, CLASSES, Distributed.start(config.run), training=training)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), MemoryError()]
)
def test_lack_of_memory_names_the_batch_size(error: Exception) -> None:
    def end(features: Tensor, logits: Tensor) -> None:
        raise error

    config = config_of()
    with (
        pytest.raises(UserError, match=r"^data\.batch_size: 4 images .*lower data\.batch_size"),
        memory_explained(config),
    ):
        prove(Net(end), config, CLASSES, Distributed.start(config.run))
    with pytest.raises(RuntimeError, match="another"), memory_explained(config):
        raise RuntimeError("another")


def test_ranks_refuse_together_with_one_message(tmp_path: Path, launcher: Any) -> None:
    tiny = ["model.kwargs.stem=imagenet", "data.image_size=16", "data.batch_size=1"]  # 1 × 1 maps of one image
    options = [*tiny, "run.device=cpu", "run.threads=1", f"run.dir={tmp_path / 'run'}"]
    command = [ROOT / "train.py", "--config", ROOT / "configs" / "quickstart.yaml", *options]
    ranks = launcher.start_ranks(2, *command)
    assert [rank.wait() for rank in ranks] == [2, 2]
    [line] = [line for rank in ranks for line in rank.errors.splitlines()]
    assert line.startswith("error: data.batch_size: with one image of 16 × 16")
    assert not (tmp_path / "run").exists()
