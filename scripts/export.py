"""Write a trained network as ONNX or as an exported program of PyTorch, folded and checked.

    python scripts/export.py --checkpoint RUN|CHECKPOINT|WEIGHTS --format onnx|pt2 --out FILE [--image-size N]
        [--fixed-size] [--weights auto|ema|raw] [--images IMAGE|FOLDER ...] [--config FILE] [KEY.PATH=VALUE ...]

The file takes any number of images, and images of any size where the network does. It is left only if its logits are
those of PyTorch to 1e-4. The last line on stdout says as JSON what was written, and what the same is unfolded.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from acmix.checkpoint.atomic import prove_writable
from acmix.errors import UserError
from acmix.json_text import json_text
from acmix.process.program import Arguments, run_program

if TYPE_CHECKING:
    from torch import Tensor

    from acmix.export.load import Trained

STEPS = 4
IMAGES = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Export as the command line says; returns the exit status."""
    return run_program(lambda: export_from(parse(arguments)))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Arguments(prog="export.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="a run folder, a checkpoint or weights")
    parser.add_argument("--format", required=True, choices=("onnx", "pt2"), help="pt2: torch.export's archive")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="file to write: .onnx or .pt2")
    parser.add_argument("--image-size", type=int, metavar="N", help="side of the images; by default the run's")
    parser.add_argument("--fixed-size", action="store_true", help="images of that size only: a smaller, faster graph")
    parser.add_argument(
        "--weights", choices=("auto", "ema", "raw"), default="auto", help="auto: ema where there is one"
    )
    parser.add_argument(
        "--images", action="append", type=Path, default=[], metavar="PATH",
        help="image or folder to check the file on (may be repeated); by default images of the run's validation split",
    )  # fmt: skip
    parser.add_argument("--config", metavar="FILE", help="YAML file; not needed where the run's own is found")
    parser.add_argument("overrides", nargs="*", metavar="KEY.PATH=VALUE", help="config values to override")
    return parser.parse_intermixed_args(arguments)


def export_from(options: argparse.Namespace) -> int:
    """Load, export, check, report. Raises UserError."""
    if options.out.suffix != f".{options.format}":
        raise UserError(f"--out {options.out}: the name must end in .{options.format}")
    prove_writable("--out", options.out)
    from tqdm import tqdm

    from acmix.export.load import load_trained
    from acmix.export.onnx import require_onnx
    from acmix.export.write import export

    if options.format == "onnx":
        require_onnx()
    size = [] if options.image_size is None else [f"data.image_size={options.image_size}"]
    trained = load_trained(options.checkpoint, options.config, options.weights, [*options.overrides, *size])
    images, source = check_images(trained, options.images)
    with tqdm(total=STEPS, disable=not sys.stderr.isatty()) as bar:

        def step(doing: str) -> None:
            bar.set_description(doing)
            bar.update()

        result = export(trained, images, options.format, options.out, fixed_size=options.fixed_size, step=step)
    print(describe(result, source))
    print(json_text({**result, "checked_on": source}), flush=True)
    return 0


def check_images(trained: "Trained", paths: Sequence[Path]) -> tuple["Tensor", str]:
    """Images to check the file on, and what they are: those given, else the run's, else noise. Raises UserError."""
    import torch

    from acmix.data.images import BadImage
    from acmix.export.images import list_images, read_image, validation_images
    from acmix.export.preprocessing import Preprocessing

    if not paths:
        try:
            return validation_images(trained, IMAGES), "validation images"
        except UserError as error:
            print(f"warning: checked on noise, not on images: {error}; or give --images FOLDER", file=sys.stderr)
        shape = (IMAGES, trained.config.model.in_chans, *trained.config.data.size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)), "noise"
    transform = Preprocessing.of(trained.config).transform()
    files = list_images(paths)
    try:
        images = [read_image(file, transform) for file in (files * IMAGES)[:IMAGES]]
    except BadImage as error:
        raise UserError(f"--images: {error}; remove it or give others") from None
    return torch.stack(images), "given images"


def describe(result: dict, source: str) -> str:
    """The result for people."""
    before, (height, width) = result["unfolded"], result["size"]
    return (
        f"Wrote {result['out']}: {result['nodes']} nodes, {result['megabytes']:.2f} MB, "
        f"{result['milliseconds']:.2f} ms for an image of {height}×{width} (median, one thread)\n"
        f"Without folding: {before['nodes']} nodes, {before['megabytes']:.2f} MB, {before['milliseconds']:.2f} ms\n"
        f"Logits as PyTorch's to {result['largest_difference']:.1e} on {source}; any {', any '.join(result['dynamic'])}"
    )


if __name__ == "__main__":
    sys.exit(main())
