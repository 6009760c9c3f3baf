"""Write a trained network as a folder for timm and the Hugging Face hub.

    python scripts/export_hf.py --checkpoint RUN|CHECKPOINT|WEIGHTS --out FOLDER [--weights auto|ema|raw] [--force]

FOLDER gets model.safetensors, config.json and a model card (README.md) with data, recipe, figures and path weights.
After `import acmix.models`, timm.create_model("local-dir:FOLDER", pretrained=True) loads it. The last line on stdout
says as JSON what was written. Exit status: 0 done, 2 refused.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from acmix.process.program import Arguments, run_program


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_program(lambda: export(arguments))


def export(arguments: Sequence[str] | None) -> int:
    """Read, build, write. Raises UserError for bad usage, weights that do not fit, or a folder that holds something."""
    parser = Arguments(prog="export_hf.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="a run folder, a checkpoint or weights")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="folder to write")
    parser.add_argument("--config", metavar="FILE", help="YAML file; not needed where the run's own is found")
    parser.add_argument(
        "--weights", choices=("auto", "ema", "raw"), default="auto", help="auto: ema where there is one"
    )
    parser.add_argument("--force", action="store_true", help="replace FOLDER if it holds something")
    parser.add_argument("overrides", nargs="*", metavar="KEY.PATH=VALUE", help="config values to override")
    options = parser.parse_intermixed_args(arguments)
    from acmix.checkpoint.atomic import prove_writable
    from acmix.config import load_config
    from acmix.engine.run_folder import config_of_run, find_config

    path, config_path = find_config(options.checkpoint, options.config)
    config = load_config(config_path, options.overrides)
    from acmix.export.hub import describe, load_trained, refuse_full, refuse_own, write_folder

    refuse_full(options.out, force=options.force)
    refuse_own(options.out, path, config_path)
    prove_writable("--out", options.out, folder=True)
    run = (config_of_run(path) or config_path).resolve().parent
    trained = load_trained(path, config, run, options.weights)
    write_folder(trained, options.out, force=options.force)
    print(describe(trained, options.out), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
