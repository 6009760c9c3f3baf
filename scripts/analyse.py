"""Compare the layers of one or two trained networks by linear CKA, or measure their effective receptive fields.

    python scripts/analyse.py RUN [RUN2] --cka|--receptive-field [--images N] [--out FILE.png] [--json FILE]

RUN is a run folder or a checkpoint in one. The images are N of the validation set, evenly spaced, as each run's config
prepares them. The last line on stdout is the result as JSON: for --cka `rows` and `columns`, the layers, and `cka`, a
list of rows from 0 to 1; for --receptive-field a list of {run, areas}, the share of the image's area that holds
20, 50 and 99 % of the field. Exit status: 0 done; 2 bad usage or input; 1 anything else.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from acmix.analysis.cka import cka_matrix, layer_names, layer_outputs
from acmix.analysis.receptive_field import field_areas, receptive_field
from acmix.checkpoint.atomic import prove_writable, write_atomically
from acmix.checkpoint.layout import names_something
from acmix.checkpoint.weights import pick_weights
from acmix.config import load_config
from acmix.data.loader import build_val, resolve_num_classes
from acmix.engine.forward import network_inputs
from acmix.engine.run_folder import config_of_run, trained_classes
from acmix.errors import UserError
from acmix.export.load import build_network
from acmix.json_text import json_text
from acmix.paths import expand_path, missing_path_hint
from acmix.process.distributed import Distributed
from acmix.process.program import Arguments, run_program, whole_number
from acmix.telemetry.figure_file import check_figure_file, drawn_text, save_figure


class Opened(NamedTuple):
    """A trained network, and the batches of images that it is shown, with their places in the validation set."""

    name: str
    model: nn.Module
    batches: list[Tensor]
    ids: list[int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, 2 for bad usage or input."""
    return run_program(lambda: analyse(arguments))


def analyse(arguments: Sequence[str] | None) -> int:
    """Measure as the command line says and write what it asks for. Raises UserError."""
    parser = Arguments(prog="analyse.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder or a checkpoint in one; two at most")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--cka", action="store_true", help="layers of RUN against those of RUN2, or its own")
    what.add_argument("--receptive-field", action="store_true", help="effective receptive field of each run")
    parser.add_argument("--images", type=whole_number, default=256, metavar="N", help="validation images (256)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="picture to write: .png, .svg or .pdf")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to a file too")
    options = parser.parse_args(arguments)
    if len(options.runs) > 2:
        raise UserError("analyse.py compares two runs at most")
    if options.out is not None:
        check_figure_file("--out", options.out, options.json)
    if options.json is not None:
        prove_writable("--json", options.json)
    runs = [open_run(run, options.images) for run in options.runs]
    result, figure = compare_layers(runs) if options.cka else measure_fields(runs)
    line = json_text(result)
    print(line, flush=True)
    if options.json is not None:
        write_atomically(options.json, line + "\n", make_parents=True)
    if options.out is not None:
        save_figure(figure, options.out)
    return 0


def open_run(run: str, images: int) -> Opened:
    """The network of a run and the images it is shown. Raises UserError."""
    path = Path(expand_path(run, "RUN"))
    if not names_something(path):
        raise UserError(f"RUN {path}: no such run or checkpoint{missing_path_hint(path)}")
    if (config_file := config_of_run(path)) is None:
        raise UserError(f"RUN {path}: does not lie in a run folder; give a run, or a checkpoint in one")
    config = load_config(config_file)
    dist = Distributed.start(config.run)
    picked, classes = pick_weights(path)
    data = build_val(config, classes=classes or trained_classes(path))
    model = build_network(config, resolve_num_classes(config, data), picked, path)
    batches = list(data.spread(images))
    inputs = [network_inputs(batch, config.precision, dist.device)[0] for batch in batches]
    return Opened(run, model.to(dist.device).eval(), inputs, [int(i) for batch in batches for i in batch.ids])


def compare_layers(runs: Sequence[Opened]) -> tuple[dict[str, Any], Figure]:
    """Linear CKA of every layer of the first run with every layer of the last. Raises UserError."""
    first, last = runs[0], runs[-1]
    if first.ids != last.ids:
        raise UserError(f"{first.name} and {last.name} have other validation images: CKA compares networks on the same")
    names = [layer_names(run.model) for run in (first, last)]
    if not all(names):
        raise UserError("a network without ACmix blocks and without feature_info has no layers to compare")
    if len(first.ids) < 2:
        raise UserError(
            "--cka compares how networks tell images apart: it takes two images at least, and many more to say much"
        )
    features = [_features(run, layers) for run, layers in zip((first, last), names, strict=True)]
    for run, layers in zip((first, last), features, strict=True):
        if not all(layer.isfinite().all() for layer in layers):
            raise _diverged(run)
    matrix = cka_matrix(*features).clamp(0, 1)  # rounding goes beyond
    figure = Figure(
        figsize=(1.5 + 0.35 * max(len(names[1]), 8), 1.2 + 0.3 * max(len(names[0]), 6)), layout="constrained"
    )
    axis = figure.subplots()
    picture = axis.imshow(matrix.numpy(), vmin=0, vmax=1, cmap="viridis")
    axis.set_xticks(range(len(names[1])), names[1], rotation=90)
    axis.set_yticks(range(len(names[0])), names[0])
    axis.set(title=f"Linear CKA, {len(first.ids)} images", xlabel=_short(last.name), ylabel=_short(first.name))
    figure.colorbar(picture, ax=axis)
    return {"rows": names[0], "columns": names[1], "cka": matrix.tolist()}, figure


def _features(run: Opened, layers: list[str]) -> list[Tensor]:
    parts = [[out.cpu() for out in layer_outputs(run.model, images, layers)] for images in run.batches]
    return [torch.cat(outputs) for outputs in zip(*parts, strict=True)]


def measure_fields(runs: Sequence[Opened]) -> tuple[list[dict[str, Any]], Figure]:
    """The effective receptive field of each run, and its areas."""
    figure = Figure(figsize=(4.5 * len(runs), 4.2), layout="constrained")
    result = []
    for axis, run in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs, strict=True):
        if not hasattr(run.model, "forward_features"):
            raise UserError(f"{run.name}: its network has no forward_features, whose map --receptive-field looks from")
        field = receptive_field(run.model, run.batches).cpu()
        if not field.isfinite().all():
            raise _diverged(run)
        areas = field_areas(field)
        result.append({"run": run.name, "areas": {f"{share:g}": area for share, area in areas.items()}})
        axis.imshow((field / field.max()).log10().clamp(min=-4).numpy(), cmap="viridis")
        told = ", ".join(f"{share:.0%} in {area:.0%}" for share, area in areas.items())
        axis.set(title=f"{_short(run.name)}\n{told}", xticks=[], yticks=[])
    return result, figure


def _diverged(run: Opened) -> UserError:
    return UserError(
        f"{run.name}: what its network computes is not finite: it has diverged; give a checkpoint from before"
    )


def _short(run: str) -> str:
    """The last two parts of a run's path, which tell runs apart."""
    return drawn_text("/".join(Path(run).parts[-2:]))


if __name__ == "__main__":
    sys.exit(main())
