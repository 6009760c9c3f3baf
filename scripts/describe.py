"""Say what a network is made of: the maps, heads, parameters and multiply-adds of its stages, and of their parts.

    python scripts/describe.py MODEL [KEY=VALUE ...] [--image-size N|[H,W]] [--json]
    python scripts/describe.py --config FILE [KEY.PATH=VALUE ...] [--json]

MODEL is a name of ours or of timm's, KEY=VALUE an argument of it, such as num_classes=10 or mix=attention. With a
config, model and image size are the config's, and KEY.PATH=VALUE overrides it as train.py does. One image is counted;
convolutions and matrix products cost multiply-adds, elementwise work does not. Exit status: 0 done, 2 refused.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import to_2tuple

from acmix import models
from acmix.config import load_config
from acmix.config.yaml import read_arguments, read_yaml
from acmix.errors import UserError
from acmix.json_text import json_text
from acmix.models.acmix_san import ACmixSAN
from acmix.process.program import Arguments, run_program
from acmix.telemetry.describe import Stage, as_table, describe, total
from acmix.telemetry.flops import count_like_san

_NO_ARGUMENTS = {"name": "MODEL comes first, by itself", "image_size": "give --image-size N"}


@dataclass(frozen=True)
class Wanted:
    """What to build: a model's name, its arguments, and (height, width) of the image, None for the model's own."""

    name: str
    kwargs: dict[str, Any]
    image_size: tuple[int, int] | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, 2 for bad usage."""
    return run_program(lambda: run(arguments))


def run(arguments: Sequence[str] | None) -> int:
    """Describe the model of the command line. Raises UserError."""
    parser = Arguments(prog="describe.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="MODEL [KEY=VALUE ...]", help="the model and its arguments")
    parser.add_argument("--config", type=Path, metavar="FILE", help="describe the model of this config")
    parser.add_argument("--image-size", metavar="N|[H,W]", help="sides of the image; by default the model's own")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_intermixed_args(arguments)
    wanted = _of_config(options) if options.config is not None else _of_name(options)
    given = wanted.kwargs.get("in_chans")
    in_chans = 3 if given is None else given
    with torch.random.fork_rng([]):
        model = models.create_model(wanted.name, image_size=wanted.image_size, **wanted.kwargs)
    input_size = (in_chans, *(wanted.image_size or _own_size(model)))
    try:
        stages = describe(model, input_size)
    except (RuntimeError, AssertionError, ValueError) as error:
        size = "×".join(map(str, input_size))
        raise UserError(f"{wanted.name} takes no image of {size}: {error}; give another by --image-size") from error
    like_san = count_like_san(model, torch.zeros(1, *input_size)) if isinstance(model, ACmixSAN) else None
    description = {
        "model": wanted.name,
        "kwargs": wanted.kwargs,
        "input_size": list(input_size),
        "stages": [stage.to_json() for stage in stages],
        "total": total(stages).to_json(),
        **({} if like_san is None else {"sans_counter": like_san}),
    }
    print(json_text(description) if options.json else as_text(description, stages))
    return 0


def as_text(description: dict[str, Any], stages: list[Stage]) -> str:
    """A line with the totals, and the tables."""
    size, whole = "×".join(map(str, description["input_size"])), description["total"]
    parameters, multiply_adds = (whole[key]["total"] for key in ("parameters", "multiply_adds"))
    head = f"{description['model']} on {size}: {parameters / 1e6:.2f} M parameters, {multiply_adds / 1e9:.3f} G"
    if "sans_counter" in description:  # the published figures of SAN are counted like this
        head += f" multiply-adds, {description['sans_counter'] / 1e9:.3f} G by the counter of SAN's authors"
    else:
        head += " multiply-adds"
    return f"{head}\n\n{as_table(stages)}"


def _of_name(options: argparse.Namespace) -> Wanted:
    """MODEL and its arguments. Raises UserError."""
    if not options.words or "=" in options.words[0]:
        raise UserError("give the name of a model first, such as acmix_resnet26, or --config FILE")
    name, *pairs = options.words
    kwargs = read_arguments(pairs)
    if found := next((key for key in kwargs if key in _NO_ARGUMENTS), None):
        raise UserError(f"{found}: is no argument of a network; {_NO_ARGUMENTS[found]}")
    classes = kwargs.get("num_classes")
    if classes is not None and (type(classes) is not int or classes < 0):
        raise UserError(f"num_classes: {classes!r} must be a whole number, 0 for a network without a classifier")
    size = options.image_size if options.image_size is None else _sides(read_yaml(options.image_size, "--image-size"))
    given = kwargs.get("img_size")
    if size is None and isinstance(given, int | list):
        size = to_2tuple(tuple(given) if isinstance(given, list) else given)
    return Wanted(name, kwargs, size)


def _of_config(options: argparse.Namespace) -> Wanted:
    """The model of the config. Raises UserError."""
    if options.image_size is not None:
        raise UserError("--image-size: with --config give data.image_size=N")
    config = load_config(options.config, options.words)
    kwargs = dict(config.model.kwargs)
    if config.model.num_classes is not None:
        kwargs["num_classes"] = config.model.num_classes
    return Wanted(config.model.name, kwargs, config.data.size)


def _sides(document: Any) -> tuple[int, int]:
    """(height, width) of --image-size; raises UserError."""
    value = document.values
    sides = tuple(value) if isinstance(value, list) else (value, value)
    if len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides):
        raise UserError(f"--image-size {value}: must be a number of at least 1, or [height, width]")
    return sides[0], sides[1]


def _own_size(model: torch.nn.Module) -> tuple[int, int]:
    """(height, width) that timm's default_cfg names."""
    size = timm.data.resolve_model_data_config(model)["input_size"]
    return size[1], size[2]


if __name__ == "__main__":
    sys.exit(main())
