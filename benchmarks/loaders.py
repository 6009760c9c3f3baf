"""The rows of the target table on loaders: photographs from files and from shards, and CIFAR-10 from JPEG files."""

import os
import shutil
import warnings
from collections.abc import Callable
from functools import cache, partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from torch.utils.data import DataLoader, Dataset

from acmix.config import Config, data_config, load_config
from acmix.data.folders import FolderSource, TextTable, scan_split
from acmix.data.loader import build_data
from acmix.data.prepare import Options, prepare
from acmix.process.distributed import Distributed
from benchmarks.data import measure_config
from benchmarks.rates import loader_rates, our_epoch, timm_epoch
from benchmarks.runs import ROOT, seconds_to_first_step
from benchmarks.suite import Figure, NotMeasuredError, Suite, Target
from benchmarks.timing import Samples, use_threads

IMAGES = 1024
_BATCH = 64
_SHORT_SIDE = 256
_ROUNDS = 5
_CIFAR_UPDATES, _CIFAR_BATCH = 80, 128
_NARROW = ROOT / "configs" / "cifar10" / "narrow_acmix_resnet26.yaml"
_PATHS, _READERS = 1_300_000, 8
_MIB = 1 << 20


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
        os.sync()  # else what was written takes its share of the cores while the first rounds are timed
        return _against_timm(suite, threads, ours, files, IMAGES // _BATCH)


def _cifar(suite: Suite, threads: int) -> Figure:
    """Images per second of our loader over those of timm's: pad, crop, flip and erase, all in the training process."""
    root = _cifar_root(suite)
    keys = {"dataset": "folder", "val_split": "test", "batch_size": _CIFAR_BATCH, "num_workers": 0, "image_size": 32}
    steps = ["augment.crop=pad", "augment.erase_prob=0.25"]
    config = data_config(str(root), [*(f"data.{key}={value}" for key, value in keys.items()), *steps])
    return _against_timm(suite, threads, config, config, _CIFAR_UPDATES)


def _against_timm(suite: Suite, threads: int, ours: Config, theirs: Config, updates: int) -> Figure:
    use_threads(threads)  # of the process that normalises; loader processes have one each
    sides = {"ours": our_epoch(ours, build_data(ours), suite.device), "timm": timm_epoch(theirs, suite.device)}
    images = updates * ours.data.batch_size
    mine, timm = (rate.images_per_second for rate in loader_rates(sides, images, updates, _ROUNDS))
    return Figure(mine.over(timm), note=f"{mine.median:,.0f} images/s against {timm.median:,.0f}")


def _first_step(suite: Suite, threads: int, *, again: bool) -> Figure:
    """Seconds from the start of train.py to its first step, with an empty cache or with that of the start before."""
    cold, warm = _starts(_cifar_root(suite), threads)
    return Figure(
        Samples(warm if again else (cold,)), note=f"{_NARROW.stem}; {'cached' if again else 'nothing cached'}"
    )


@cache
def _starts(root: Path, threads: int) -> tuple[float, tuple[float, ...]]:
    with TemporaryDirectory() as folder:
        start = partial(seconds_to_first_step, threads, f"data.root={root}", config=_NARROW, cache=Path(folder))
        cold, *warm = (start() for _ in range(4))
    return cold, tuple(warm)


def _waiting(suite: Suite, threads: int) -> Figure:
    """The share of its time, in percent, that training spends waiting for data."""
    config = load_config(_NARROW, [f"data.root={_cifar_root(suite)}", "run.device=cpu", f"run.threads={threads}"])
    use_threads(threads)
    with Distributed.start(config.run) as dist:
        *_, both = measure_config(config, dist, updates=10, rounds=3, timm=False)
    assert both.waiting is not None
    shares = Samples(tuple(100 * share for share in both.waiting.values))
    return Figure(shares, note=f"10 updates from the start of an epoch, {both.images_per_second.median:,.0f} images/s")


def _path_memory(suite: Suite, threads: int) -> Figure:
    """Memory that a list of paths takes in the training process and in loader processes that read it, over one copy."""
    paths = TextTable([f"n{number % 1000:08}/n{number % 1000:08}_{number}.JPEG" for number in range(_PATHS)])
    one = len(paths.content())
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # more processes than cores, as is meant
    grown = list(DataLoader(_Reading(paths), batch_size=None, sampler=range(_READERS), num_workers=_READERS))
    note = f"one copy {one / _MIB:.0f} MiB; the {_READERS} processes grew by {sum(grown) / _MIB:.1f} MiB between them"
    return Figure(Samples(((one + sum(grown)) / one,)), note=note)


class _Reading(Dataset):
    """Reads every path; gives the bytes by which the memory that this process shares with no other grew."""

    def __init__(self, paths: TextTable) -> None:
        self._paths = paths

    def __getitem__(self, _: int) -> int:
        before = _private_bytes()
        for place in range(len(self._paths)):
            self._paths[place]
        return _private_bytes() - before


def _private_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def _cifar_root(suite: Suite) -> Path:
    if suite.cifar is None:
        raise NotMeasuredError("needs --cifar FOLDER")
    return suite.cifar.resolve()


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


def _target(
    key: str, what: str, limit: float, at_least: bool, measure: Callable[[Suite, int], Figure], threads: int
) -> Target:
    return Target(f"loader_{key}", what, "cpu", limit, at_least, measure, threads=(threads,))


_PHOTOGRAPHS = "224 px training pipeline, 1,024 photographs, 2 loader processes{}: images/s / timm.data.create_loader"
_SHARDS = f", from shards of short side {_SHORT_SIDE}"
_CIFAR = "CIFAR-10 training pipeline from JPEG files (pad-crop, flip, erase), 1 process: images/s / timm's loader"
_STEP = "CIFAR-10 from JPEG files: seconds to the first step, {} start"
_WAIT = "percent of an epoch that waits for data, narrow ACmix-ResNet-26 on CIFAR-10"
_MEMORY = f"memory of a list of 1.3 million paths with {_READERS} loader processes / one copy"

LOADER_TARGETS: tuple[Target, ...] = (
    _target("files", _PHOTOGRAPHS.format(""), 1.5, True, partial(_photographs, prepared=False), 1),
    _target("shards", _PHOTOGRAPHS.format(_SHARDS), 3, True, partial(_photographs, prepared=True), 1),
    _target("cifar", _CIFAR, 30, True, _cifar, 1),
    _target("first_step_cold", _STEP.format("cold"), 25, False, partial(_first_step, again=False), 2),
    _target("first_step_again", _STEP.format("second"), 8, False, partial(_first_step, again=True), 2),
    _target("waiting", _WAIT, 1, False, _waiting, 2),
    _target("memory", _MEMORY, 1.2, False, _path_memory, 1),
)
