"""Find a learning rate: train for some steps while the rate grows, and see where the loss falls and where it diverges.

    python scripts/find_lr.py --config FILE [--out FILE.png|.svg|.pdf] [--json FILE] [--from 1e-6] [--to 1]
                              [--steps 100] [KEY.PATH=VALUE ...]

A range test on the run's own data, augmentation, loss and optimizer; it leaves no run folder. The suggestion is a tenth
of the rate of the lowest loss; the rate at which the loss falls fastest is told beside it. Both are values to put into
optimizer.lr: where optimizer.lr_batch scales that, they are scaled back. The last line on stdout is the result as JSON.
Exit status: 0 done; 2 refused, with the reason.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acmix.checkpoint.atomic import prove_writable, write_atomically
from acmix.errors import UserError
from acmix.json_text import json_text
from acmix.process.program import Arguments, run_program, whole_number
from acmix.telemetry.figure_file import check_figure_file, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn

    from acmix.config import Config
    from acmix.engine.range_test import RangeTest


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the test as the command line says; returns the exit status."""
    return run_program(lambda: find(_parse(arguments)))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    shape = argparse.RawDescriptionHelpFormatter
    parser = Arguments(prog="find_lr.py", description=__doc__, formatter_class=shape)
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="YAML file of the run")
    add("--out", type=Path, metavar="FILE", help="picture of loss over rate to write: .png, .svg or .pdf")
    add("--json", type=Path, metavar="FILE", help="file for the result with the whole curve")
    add("--from", dest="first", type=float, default=1e-6, metavar="RATE", help="first learning rate (1e-6)")
    add("--to", dest="last", type=float, default=1.0, metavar="RATE", help="last learning rate (1)")
    add("--steps", type=whole_number, default=100, metavar="N", help="steps from the one to the other (100)")
    add("overrides", nargs="*", metavar="KEY.PATH=VALUE", help="config values to override")
    return parser.parse_intermixed_args(arguments)


def find(options: argparse.Namespace) -> int:
    """Test, print, write; raises UserError."""
    from acmix.config import load_config

    _check(options)
    config = load_config(options.config, options.overrides)
    result, scale = _test(config, options)
    if not len(result.losses):
        raise UserError("the first loss is not finite, at any rate: look at the data, or at the weights to start from")
    answer = _answer(result, scale)
    if options.out is not None:
        save_figure(draw(result, scale, config.model.name), options.out)
    if options.json is not None:
        curve = {"lr": (result.rates * scale).tolist(), "loss": result.losses.tolist()}
        whole = answer | curve | {"smoothed": result.smoothed.tolist()}
        write_atomically(options.json, json_text(whole) + "\n", make_parents=True)
    if answer["suggestion"] is None:
        print("No rate to suggest: the loss never falls; give other rates by --from and --to, or more --steps")
    else:
        print(f"Suggestion: optimizer.lr={answer['suggestion']:.2g}, a tenth of the rate of the lowest loss")
        print(f"The loss falls fastest at {answer['steepest']:.2g} and is lowest at {answer['lowest']:.2g}")
    print(json_text(answer))
    return 0


def _check(options: argparse.Namespace) -> None:
    """Refuse what can be refused before the slow imports."""
    if not 0 < options.first < options.last < float("inf"):
        raise UserError(f"--from, --to: must be 0 < FROM < TO, got {options.first:g} and {options.last:g}")
    if options.steps < 10:
        raise UserError(f"--steps: {options.steps} are too few to see a curve; give at least 10")
    if options.out is not None:
        check_figure_file("--out", options.out, options.json)
    if options.json is not None:
        prove_writable("--json", options.json)


def _test(config: "Config", options: argparse.Namespace) -> "tuple[RangeTest, float]":
    """The result, and what a rate of it is multiplied by to become `optimizer.lr`."""
    from tqdm import tqdm

    from acmix.data.loader import build_data
    from acmix.data.transforms import build_mixup
    from acmix.engine.learner import Learner
    from acmix.engine.optim import peak_lr
    from acmix.engine.proof import memory_explained
    from acmix.engine.range_test import growing_rates, range_test
    from acmix.engine.run_folder import classes_to_keep
    from acmix.process.distributed import Distributed
    from acmix.process.environment import set_up_torch

    with Distributed.start(config.run) as dist, memory_explained(config):
        if dist.world_size > 1:
            raise UserError("find_lr.py runs in one process: start it without torchrun")
        set_up_torch(config.run, dist.device)
        data = build_data(config, classes=classes_to_keep(config, None))
        model, new = _build_model(config, data, dist)
        learner = Learner(config, model, dist, data.train, mixing=build_mixup(config, data.num_classes), new=new)
        scale = config.optimizer.lr / peak_lr(config.optimizer, data.train.global_batch)
        rates = growing_rates(options.first / scale, options.last / scale, options.steps)
        with tqdm(total=options.steps, desc="steps", disable=not sys.stderr.isatty(), leave=False) as bar:
            return range_test(learner, data.train, rates, bar.update), scale


def _build_model(config: "Config", data: Any, dist: Any) -> "tuple[nn.Module, list[str]]":
    """The network as a run begins with it, and the names of its new parameters."""
    from acmix import models
    from acmix.checkpoint.grown import new_parameters
    from acmix.checkpoint.weights import start_from
    from acmix.data.loader import resolve_num_classes
    from acmix.engine.proof import prove

    start, width = config.model.checkpoint, resolve_num_classes(config, data)
    kwargs = config.model.kwargs | ({"pretrained": False} if start else {})
    model = models.create_model(config.model.name, width, image_size=config.data.size, **kwargs)
    prove(model, config, width, dist, training=True)
    if start:
        start_from(model, start, models.load_official)
    return model, new_parameters(start) if start else []


def _answer(result: "RangeTest", scale: float) -> dict[str, Any]:
    """The result as JSON has it: rates are values of `optimizer.lr`; None where the loss never falls."""
    steepest = result.steepest
    rates = result.rates * scale
    return {
        "suggestion": None if steepest is None else float(rates[result.minimum]) / 10,
        "steepest": None if steepest is None else float(rates[steepest]),
        "lowest": None if steepest is None else float(rates[result.minimum]),
        "steps": len(result.losses),
        "diverged": result.diverged,
    }


def draw(result: "RangeTest", scale: float, title: str) -> "Figure":
    """Loss over `optimizer.lr`, with the suggestion and the steepest descent marked."""
    import matplotlib
    import numpy as np
    from matplotlib.figure import Figure

    from acmix.telemetry.plot import BLUE, GREY, INK, STYLE, VERMILLION

    answer, rates, smoothed = _answer(result, scale), result.rates * scale, result.smoothed
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4), layout="constrained")
        axis = figure.subplots()
        axis.plot(rates, result.losses, color=GREY, alpha=0.45, linewidth=0.8, label="loss of a step")
        axis.plot(rates, smoothed, color=INK, linewidth=1.6, label="smoothed")
        for key, name, colour, marker in (
            ("suggestion", "suggestion, a tenth of the lowest", BLUE, "o"),
            ("steepest", "falls fastest", VERMILLION, "s"),
            ("lowest", "lowest", INK, "v"),
        ):
            if (rate := answer[key]) is not None:
                height = np.interp(np.log(rate), np.log(rates), smoothed)
                axis.axvline(rate, color=colour, linewidth=0.8, linestyle=":")
                axis.plot(rate, height, marker, color=colour, label=f"{name}: {rate:.2g}")
        low, high = smoothed.min(), smoothed.max()
        axis.set(
            xscale="log", xlabel="optimizer.lr", ylabel="training loss", title=f"{title}: learning-rate range test"
        )
        axis.set_ylim(low - 0.1 * (high - low or 1), high + 0.1 * (high - low or 1))
        axis.legend()
    return figure


if __name__ == "__main__":
    sys.exit(main())
