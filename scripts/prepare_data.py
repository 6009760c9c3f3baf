"""Make shards of a data set that are quick to read: images of one size, in a few large files with checksums.

    python scripts/prepare_data.py ROOT OUT [--short-side N] [--quality Q] [--format jpeg|webp] [--shards N]
                                            [--workers W] [--on-error stop|skip] [data.KEY=VALUE ...]

ROOT is what data.root would be: a folder with train/CLASS/* and val/CLASS/* (or validation, valid, test), or with the
class folders themselves; with data.dataset=NAME, any data set (imagenet: the official tar files). Train from the result
with data.dataset=wds/NAME data.root=OUT. A call that was stopped goes on where it left off; the files written do not
depend on --workers.
Exit status: 0 done; 2 an image that cannot be read, bad usage or bad data.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from acmix.checkpoint.atomic import prove_writable
from acmix.config import as_override, data_config
from acmix.data.check import find_splits
from acmix.data.datasets import Source, build_sources, build_val_source
from acmix.data.folders import readable_name
from acmix.data.prepare import Options, prepare
from acmix.errors import UserError
from acmix.paths import escape_path
from acmix.process.program import Arguments, run_program


def main(arguments: Sequence[str] | None = None) -> int:
    """Make shards as the command line says; returns the exit status."""
    return run_program(lambda: make_shards(arguments))


def make_shards(arguments: Sequence[str] | None) -> int:
    """Open the data, write the shards, tell what came of it. Raises UserError."""
    given = _arguments().parse_intermixed_args(arguments)
    for name, value, most in (("--short-side", given.short_side, 65535), ("--quality", given.quality, 100),
                              ("--shards", given.shards, 10**6), ("--workers", given.workers, 1024)):  # fmt: skip
        if value is not None and not 1 <= value <= most:
            raise UserError(f"{name}: must be from 1 to {most}, got {value}")
    for key in (override.partition("=")[0] for override in given.overrides):
        if key == "data.root" or not (key.startswith("data.") or key == "model.num_classes"):  # of labels by number
            told = "ROOT says it" if key == "data.root" else "the shards of a data set follow from data.* alone"
            raise UserError(f"{key}: {told}; leave it out")
    prove_writable("OUT", given.out, folder=True)
    options = Options(given.short_side, given.quality, given.format, given.shards, given.on_error)
    sources = open_splits(given.root, given.overrides, given.out)
    manifest = prepare(sources, given.out, options, given.workers, _progress)
    for split in manifest.splits.values():
        for text in split.skipped:
            print(f"skipped {split.name}: {readable_name(text)}")
        size = f"{split.bytes / 1e6:,.1f} MB in {len(split.shards)} shards"
        print(f"{split.name}: {len(split)} images, {size}, {len(split.skipped)} skipped")
    keys = {"data.dataset": f"wds/{given.root.resolve().stem}", "data.root": escape_path(str(given.out))}
    print("train with", shlex.join(as_override(key, value) for key, value in keys.items()), flush=True)
    return 0


def _arguments() -> Arguments:
    shape = argparse.RawDescriptionHelpFormatter
    parser = Arguments(prog="prepare_data.py", description=__doc__, formatter_class=shape)
    add = parser.add_argument
    add("root", type=Path, metavar="ROOT", help="the data set")
    add("out", type=Path, metavar="OUT", help="empty folder for the shards")
    add("--short-side", type=int, metavar="N", help="make larger images smaller: pixels of their short side")
    add("--quality", type=int, metavar="Q", help="of the encoder (90; JPEG files that fit are not encoded again)")
    add("--format", choices=("jpeg", "webp"), default="jpeg", help="how images are stored (jpeg)")
    add("--shards", type=int, metavar="N", help="shards of each split (one for 4096 images, and 8 at least)")
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="W", help="processes that read (all cores)")
    add("--on-error", choices=("stop", "skip"), default="stop", help="an image that cannot be read (stop)")
    add("overrides", nargs="*", metavar="data.KEY=VALUE", help="further keys of a config")
    return parser


def open_splits(root: Path, overrides: Sequence[str], out: Path | None = None) -> dict[str, Source]:
    """The splits at ROOT, train and val where there are both, with the same classes.

    Raises UserError, also for an OUT inside one of them, where it would be taken for a class.
    """
    config = data_config(str(root), overrides)
    data, names = config.data, {"train": config.data.train_split, "val": config.data.val_split}
    if root.is_file():
        del names["val"]
    elif data.dataset == "folder":
        told = {override.partition("=")[0] for override in overrides}
        given = (names[role] if f"data.{role}_split" in told else None for role in ("train", "val"))
        names = {role: str(folder.relative_to(root)) for role, folder in find_splits(root, *given).items()}
    for folder in (root / name for name in names.values()):
        if out is not None and folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"OUT {out}: lies among the images of {folder}; choose a folder outside")
    if len(names) == 2:
        keys = {"train_split": names["train"], "val_split": names["val"]}
        train, val, _ = build_sources(config.model_copy(update={"data": data.model_copy(update=keys)}))
        return {"train": train, "val": val}
    [(role, split)] = names.items()
    alone = data.model_copy(update={"val_split": split})
    return {role: build_val_source(config.model_copy(update={"data": alone}))}


def _progress(items: Iterator[Any], total: int, name: str) -> Iterator[Any]:
    return iter(tqdm(items, desc=name, total=total, unit="image", disable=not sys.stderr.isatty()))


if __name__ == "__main__":
    sys.exit(main())
