"""Evaluate a run, a checkpoint or a weights file: top-1, top-5, loss, count.

python eval.py --checkpoint RUN|CHECKPOINT|WEIGHTS [--config FILE] [--json FILE] [--report DIR] [KEY.PATH=VALUE ...]
torchrun --nproc-per-node N eval.py --checkpoint ...

The last line on stdout is the result as JSON. Exit status: 0 done; 2 bad usage, config or data; 1 anything else.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from acmix.json_text import json_text
from acmix.process.program import Arguments, run_program, whole_number

if TYPE_CHECKING:
    from torch import Tensor


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate as the command line says; returns the exit status."""
    return run_program(lambda: evaluate_from(parse(arguments)))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Arguments(prog="eval.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="a run folder, a checkpoint or weights")
    parser.add_argument("--config", metavar="FILE", help="YAML file; not needed where the run's own is found")
    parser.add_argument(
        "--weights", choices=("auto", "ema", "raw"), default="auto", help="auto: ema where there is one"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the result to a file too")
    parser.add_argument("--report", metavar="DIR", type=Path, help="write per-class results and a confusion matrix")
    parser.add_argument("--paths", action="store_true", help="measure the paths of ACmix blocks, and lesions of them")
    parser.add_argument("--paths-images", type=whole_number, metavar="N", help="--paths with N images only")
    parser.add_argument("overrides", nargs="*", metavar="KEY.PATH=VALUE", help="config values to override")
    return parser.parse_intermixed_args(arguments)


def evaluate_from(options: argparse.Namespace) -> int:
    """Build the model and the validation data and evaluate; returns the exit status."""
    from acmix.config import load_config
    from acmix.engine.run_folder import find_config, trained_classes

    path, config_path = find_config(options.checkpoint, options.config)
    config = load_config(config_path, options.overrides)
    from acmix.checkpoint.weights import pick_weights
    from acmix.data.loader import build_val, resolve_num_classes
    from acmix.engine.confusion import Confusion, PartOfClasses
    from acmix.engine.evaluate import evaluate
    from acmix.engine.outputs import Outputs
    from acmix.engine.path_report import report_paths
    from acmix.engine.proof import memory_explained, prove
    from acmix.export.load import build_network
    from acmix.process.distributed import Distributed
    from acmix.process.environment import set_up_torch
    from acmix.process.signals import ending_with_launcher

    outputs = Outputs(options.json, options.report)
    with ending_with_launcher(), Distributed.start(config.run) as dist, memory_explained(config):
        dist.on_main(outputs.prove)
        set_up_torch(config.run, dist.device)
        weights, classes = dist.all_or_none(lambda: pick_weights(path, options.weights))
        classes = classes or trained_classes(path)
        data = dist.all_or_none(lambda: build_val(config, rank=dist.rank, world_size=dist.world_size, classes=classes))
        width = dist.all_or_none(lambda: resolve_num_classes(config, data))
        model = dist.all_or_none(lambda: build_network(config, width, weights, path))
        dist.all_or_none(lambda: prove(model, config, width, dist))
        confusion = Confusion(width, dist.device) if options.report else None
        part = PartOfClasses(data.present, width, dist)

        def observe(logits: "Tensor", targets: "Tensor") -> None:
            part.add(logits, targets)
            if confusion:
                confusion.add(logits, targets)

        metrics = evaluate(model, data, dist, config.precision, observe=observe)
        found = {"checkpoint": str(path), "model": config.model.name, **(metrics or {}), "classes": part.summary()}
        if options.paths or options.paths_images:
            found |= report_paths(model, data, dist, config.precision, options.paths_images)
        matrix = confusion.matrix(dist) if confusion else None
        result = json_text(found)
        if dist.is_main:
            print(result, flush=True)
        dist.on_main(lambda: outputs.write(result, matrix, data.classes, data.present))
    return 0


if __name__ == "__main__":
    sys.exit(main())
