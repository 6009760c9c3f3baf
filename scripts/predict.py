"""Name what image files show, by a trained network or an ONNX file made of it.

    python scripts/predict.py --checkpoint RUN|CHECKPOINT|WEIGHTS|FILE.onnx IMAGE|FOLDER ... [--top K] [--json FILE]
        [--draw FOLDER] [--weights auto|ema|raw] [--config FILE] [KEY.PATH=VALUE ...]

Of folders all images are taken. --draw writes a picture for each image: where the attention of each stage looks from
the centre, and what each path gives. An image that cannot be read is named, the others are done; exit status 2 then.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from acmix.checkpoint.atomic import prove_writable, write_atomically
from acmix.data.folders import readable_name
from acmix.errors import UserError
from acmix.json_text import json_text
from acmix.paths import expand_path, path_argument
from acmix.process.program import BAD_USAGE, Arguments, run_program

if TYPE_CHECKING:
    from acmix.export.load import Trained
    from acmix.export.predict import Prediction, Predictor


def main(arguments: Sequence[str] | None = None) -> int:
    """Predict as the command line says; returns the exit status."""
    return run_program(lambda: predict_from(parse(arguments)))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; what holds a `=` and is no path is an override."""
    parser = Arguments(prog="predict.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="run, checkpoint, weights or ONNX file")
    parser.add_argument("images", nargs="+", metavar="IMAGE|FOLDER", help="images, then KEY.PATH=VALUE to override")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="classes for each image (5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the predictions there, too")
    parser.add_argument("--draw", type=Path, metavar="FOLDER", help="write a picture for each image")
    parser.add_argument(
        "--weights", choices=("auto", "ema", "raw"), default="auto", help="auto: ema where there is one"
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file; not needed where the run's own is found")
    options = parser.parse_intermixed_args(arguments)
    options.overrides = [text for text in options.images if "=" in text and not Path(text).exists()]
    options.images = [path_argument(text) for text in options.images if text not in options.overrides]
    if not options.images:
        raise UserError("no images given; name files or folders")
    if options.top < 1:
        raise UserError(f"--top: must be at least 1, got {options.top}")
    return options


def predict_from(options: argparse.Namespace) -> int:
    """Read, predict, report; returns 2 where an image could not be read. Raises UserError."""
    if options.json is not None:
        prove_writable("--json", options.json)
    if options.draw is not None:
        prove_writable("--draw", options.draw, folder=True)
    from tqdm import tqdm

    from acmix.export.images import list_images
    from acmix.export.predict import Prediction, predict

    files = list_images(options.images)
    pictures = [] if options.draw is None else picture_files(options.draw, files)
    refuse_to_replace(files, options.json, pictures)
    predictor, trained = open_predictor(options)
    results, bad = [], 0
    found = tqdm(predict(predictor, files, options.top), total=len(files), disable=not sys.stderr.isatty())
    for place, result in enumerate(found):
        if not isinstance(result, Prediction):
            path, error = result
            tqdm.write(f"error: {readable_name(str(path))}: {error.reason}", file=sys.stderr)
            bad += 1
            continue
        results.append(result.to_json())
        tqdm.write(line(result), file=sys.stdout)
        if options.draw is not None:
            assert trained is not None
            draw_to(pictures[place], result, predictor, trained)
    if options.json is not None:
        write_atomically(options.json, json_text(results, indent=2) + "\n", make_parents=True)
    if bad:
        print(f"error: {bad} of {len(files)} images cannot be read; repair or leave them out", file=sys.stderr)
    return BAD_USAGE if bad else 0


def open_predictor(options: argparse.Namespace) -> "tuple[Predictor, Trained | None]":
    """What predicts, and the network where it is not an ONNX file. Raises UserError."""
    from acmix.export.predict import network_predictor, onnx_predictor

    if options.checkpoint.endswith(".onnx"):
        if options.draw is not None:
            raise UserError("--draw: an ONNX file does not show its paths; give the run or checkpoint it was made of")
        given = ["--config"] if options.config is not None else ["--weights"] if options.weights != "auto" else []
        if ignored := [*given, *options.overrides]:
            raise UserError(
                f"{ignored[0]}: an ONNX file holds all that is known of it, so this changes nothing; leave it out"
            )
        return onnx_predictor(Path(expand_path(options.checkpoint, "--checkpoint"))), None
    if options.checkpoint.endswith(".pt2"):
        raise UserError(
            f"--checkpoint {options.checkpoint}: predict.py does not run .pt2 files; give the run or checkpoint it was "
            "made of, or an ONNX file made of that (export.py --format onnx)"
        )
    from acmix.export.load import load_trained

    trained = load_trained(options.checkpoint, options.config, options.weights, options.overrides)
    return network_predictor(trained), trained


def line(prediction: "Prediction") -> str:
    """A prediction for people."""
    shares = ", ".join(f"{name} {100 * probability:.1f} %" for name, probability in prediction.top)
    return f"{readable_name(str(prediction.path))}: {shares}"


def picture_files(folder: Path, files: Sequence[Path]) -> list[Path]:
    """The picture of each image: a .png under its name, with a number where that is taken."""
    pictures: list[Path] = []
    taken: set[str] = set()
    for file in files:
        stem, number = file.stem, 2
        while stem in taken:
            stem, number = f"{file.stem}-{number}", number + 1
        taken.add(stem)
        pictures.append(folder / f"{stem}.png")
    return pictures


def refuse_to_replace(images: Sequence[Path], json: Path | None, pictures: Sequence[Path]) -> None:
    """UserError where a file to write is one of the images."""
    read = {image.resolve() for image in images}
    for option, file in [("--json", json), *(("--draw", picture) for picture in pictures)]:
        if file is not None and file.resolve() in read:
            raise UserError(
                f"{option}: would replace {readable_name(str(file))}, one of the images; choose another place"
            )


def draw_to(file: Path, prediction: "Prediction", predictor: "Predictor", trained: "Trained") -> None:
    """Write the picture of one image."""
    import matplotlib

    from acmix.checkpoint.atomic import replacing
    from acmix.export.draw import draw_prediction
    from acmix.telemetry.plot import STYLE

    figure = draw_prediction(prediction, predictor.preprocessing, trained)
    with replacing(file, make_parents=True) as temporary, matplotlib.rc_context(STYLE):
        figure.savefig(temporary, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
