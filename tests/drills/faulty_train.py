"""train.py with a network that fails on purpose: at a given forward pass, on a given rank, once.

`model.kwargs` of the model `faulty_resnet`: fault (raise, nan, sleep, or the name of a signal it sends to itself, or
`launcher:SIGNAL` to its parent), at (forward pass, from 1), rank, during (train or eval), once (a file that is created
at the failure and prevents another). The network is the model `of`, timm's smallest ResNet unless given.
"""

import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

from timm.models import register_model
from torch import Tensor, nn

from acmix import models

FROM_TIMM = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
"""Arguments that timm's factory passes to every entry point."""


class Accident:
    """A forward hook that counts passes in training or evaluation and acts at one of them."""

    def __init__(self, fault: str, at: int, rank: int, during: str, once: str) -> None:
        self.fault, self.at, self.during, self.once = fault, at, during, once
        self.here = int(os.environ.get("RANK", "0")) == rank
        self.passes = 0

    def __call__(self, module: nn.Module, inputs: Any, logits: Tensor) -> Tensor:
        if not self.here or module.training != (self.during == "train"):
            return logits
        self.passes += 1
        if self.passes != self.at or (self.once and Path(self.once).exists()):
            return logits
        if self.once:
            Path(self.once).touch()
        return self.happen(logits)

    def happen(self, logits: Tensor) -> Tensor:
        if self.fault == "raise":
            raise ArithmeticError("planted fault")
        if self.fault == "nan":
            return logits * float("nan")
        if self.fault == "sleep":
            time.sleep(3600)
        name = self.fault.removeprefix("launcher:")
        os.kill(os.getpid() if name == self.fault else os.getppid(), getattr(signal, name))
        return logits


@register_model
def faulty_resnet(
    of: str = "test_resnet",
    fault: str = "",
    at: int = 1,
    rank: int = 0,
    during: str = "train",
    once: str = "",
    **kwargs: Any,
) -> nn.Module:
    network = models.create_model(of, **{key: value for key, value in kwargs.items() if key not in FROM_TIMM})
    if fault:
        network.register_forward_hook(Accident(fault, at, rank, during, once))
    return network


if __name__ == "__main__":
    program = Path(__file__).parents[2] / "train.py"
    sys.argv[0] = str(program)
    sys.exit(runpy.run_path(str(program))["main"]())
