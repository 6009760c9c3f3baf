"""The rows of the target table on loaders: photographs at 224 px, from files and from shards, against timm's."""

import shutil
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from acmix.config import Config, data_config
from acmix.data.folders import FolderSource, scan_split
from acmix.data.loader import build_data
from acmix.data.prepare import Options, prepare
from benchmarks.rates import loader_rates, our_epoch, timm_epoch
from benchmarks.suite import Figure, NotMeasuredError, Suite, Target

IMAGES = 1024
_BATCH = 64
_SHORT_SIDE = 256
_ROUNDS = 3


def _photographs(suite: Suite, threads: int, *, prepared: bool) -> Figure:
    """Images per second of our loader over those of timm's, which reads the files."""
    if suite.photos is None:
        raise NotMeasuredError("needs --photos FOLDER")
    with TemporaryDirectory() as name:
        root = _copied(suite.photos, Path(name) / "files")
        files, ours = _config("folder", root), _config("folder", root)
        if prepared:
            sources = {split: FolderSource(root / split) for split in ("train", "val")}
            prepare(sources, Path(name) / "shards", Options(short_side=_SHORT_SIDE))
            ours = _config("wds/photographs", Path(name) / "shards")
        sides = {
            "ours": our_epoch(ours, build_data(ours), suite.device),
            "timm": timm_epoch(files, suite.device),
        }
        mine, theirs = (rate.images_per_second for rate in loader_rates(sides, IMAGES, IMAGES // _BATCH, _ROUNDS))
    return Figure(mine.over(theirs), note=f"{mine.median:,.0f} images/s against {theirs.median:,.0f}")


def _copied(photos: Path, root: Path) -> Path:
    """The photographs, copied to as many files as are needed, in their class folders; one of each class to validate."""
    _, names, _ = scan_split(photos)
    paths = [photos / name for name in names]
    for number, path in enumerate(islice(paths * -(-IMAGES // len(paths)), IMAGES)):
        place = root / "train" / path.parent.name / f"{number:06}{path.suffix}"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    for folder in (root / "train").iterdir():
        (root / "val" / folder.name).mkdir(parents=True)
        first = min(folder.iterdir())
        shutil.copy(first, root / "val" / folder.name / first.name)
    return root


def _config(dataset: str, root: Path) -> Config:
    keys = {"dataset": dataset, "batch_size": _BATCH, "num_workers": 2, "loader": "workers", "image_size": 224}
    return data_config(str(root), [f"data.{key}={value}" for key, value in keys.items()])


_WHAT = "224 px training pipeline, 1,024 photographs, 2 loader processes{}: images/s / timm.data.create_loader"

LOADER_TARGETS: tuple[Target, ...] = (
    Target("loader_files", _WHAT.format(""), "cpu", 1.5, True, partial(_photographs, prepared=False), threads=(1,)),
    Target(
        "loader_shards",
        _WHAT.format(f", from shards of short side {_SHORT_SIDE}"),
        "cpu",
        3,
        True,
        partial(_photographs, prepared=True),
        threads=(1,),
    ),
)
