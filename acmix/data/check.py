"""Read a whole image folder and list what would stop or mislead a training run. Light (no torch)."""

import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from acmix.data.classes import likely_meant, loose_name, places_in
from acmix.data.folders import FolderId, folder_id, folders_above, is_folder, is_image_name, is_lost_folder, is_text
from acmix.data.images import BadImage, decode_image, is_sixteen_bit, open_image, read_image_file
from acmix.data.orphans import helpers_first_call
from acmix.errors import UserError

VAL_NAMES = ("val", "validation", "valid", "test")
"""Names a validation split goes by, tried in this order."""

_NAMES_OF_FORMAT = {
    **{"JPEG": (".jpg", ".jpeg"), "MPO": (".jpg", ".jpeg"), "PNG": (".png",), "WEBP": (".webp",), "BMP": (".bmp",)},
    **{"DIB": (".bmp",), "GIF": (".gif",), "TIFF": (".tif", ".tiff"), "PPM": (".ppm", ".pgm", ".pbm")},
}
_CHUNK = 64


@dataclass(frozen=True)
class Problem:
    """Something wrong with a file or folder; `fatal` when it would stop a run.

    Kinds of files: truncated, empty, not_image, bomb, corrupt, unreadable (fatal); misnamed, cmyk, 16bit,
    duplicate, stray, hidden_file, and not_image for a file that training ignores (harmless).
    Kinds of folders: empty_class, hidden_folder, class_mismatch (of validation alone), no_classes, link_loop,
    dead_link, bad_name (fatal); not_validated (of training alone), similar_classes (harmless).
    """

    path: str
    kind: str
    fatal: bool
    detail: str


@dataclass
class Report:
    """What was read and what was found."""

    root: str
    files: int = 0
    problems: list[Problem] = field(default_factory=list)

    @property
    def fatal(self) -> bool:
        """Whether anything found would stop a run."""
        return any(problem.fatal for problem in self.problems)

    def to_json(self) -> dict[str, Any]:
        """Plain data: `root`, `files` (images read), `counts` by kind, `problems`."""
        counts = dict(sorted(Counter(problem.kind for problem in self.problems).items()))
        problems = [asdict(problem) for problem in self.problems]
        return {"root": self.root, "files": self.files, "counts": counts, "problems": problems}


@dataclass(frozen=True)
class _Finding:
    path: str
    problems: list[Problem]
    content: bytes | None  # digest of size and pixels


def check_folder(
    root: Path,
    train_split: str | None = None,
    val_split: str | None = None,
    workers: int = 1,
    progress: Callable[[Iterator[Any], int], Iterator[Any]] = lambda items, total: items,
) -> Report:
    """Read every image below `root`: its splits, or `root` itself if it holds the class folders.

    `progress(iterator, total)` may wrap the stream of results, as tqdm does. Raises UserError when there is
    nothing to check.
    """
    splits = find_splits(root, train_split, val_split)
    report = Report(str(root))
    images: dict[str, list[str]] = {}
    classes: dict[str, set[str]] = {}
    for name, folder in splits.items():
        images[name], classes[name] = _survey(folder, report.problems)
    _compare_classes(splits, classes, report.problems)
    everything = [path for paths in images.values() for path in paths]
    report.files = len(everything)
    content: dict[str, bytes] = {}
    for finding in progress(_read_all(everything, workers), len(everything)):
        report.problems += finding.problems
        if finding.content is not None:
            content[finding.path] = finding.content
    if len(splits) == 2:
        report.problems += _duplicates(images["train"], images["val"], content)
    report.problems.sort(key=lambda problem: (problem.path, problem.kind))
    return report


def find_splits(root: Path, train_split: str | None, val_split: str | None) -> dict[str, Path]:
    """The folders of `train` and `val` below `root`; a flat class folder counts as train alone. Raises UserError."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    train = root / (train_split or "train")
    names = [val_split] if val_split is not None else list(VAL_NAMES)
    val = next((root / name for name in names if (root / name).is_dir()), None)
    for given, folder in ((train_split, train), (val_split, val)):
        if given is not None and (folder is None or not folder.is_dir()):
            raise UserError(f"{root / given}: no such folder")
    if not train.is_dir():
        return {"train": root} if val is None else {"val": val}
    return {"train": train} if val is None or val == train else {"train": train, "val": val}


def _survey(split: Path, problems: list[Problem]) -> tuple[list[str], set[str]]:
    """Images and class names of a split; reports what is wrong with its folders."""
    images: list[str] = []
    classes = set()
    walk = _Walk(problems)
    above = folders_above(split) | {folder_id(split)}
    for entry in _entries(split, problems):
        if not is_folder(entry):
            problems.append(_not_seen(entry, "stray", "outside the class folders"))
        elif entry.name.startswith("."):
            problems.append(Problem(entry.path, "hidden_folder", True, "would be taken for a class; remove it"))
        else:
            classes.add(entry.name)
            if not is_text(entry.name):
                problems.append(Problem(entry.path, "bad_name", True, "the name of a class must be UTF-8; rename it"))
            before = len(problems)
            found = list(walk.images_below(Path(entry.path), above))
            images += found
            if not found and not any(problem.kind == "link_loop" for problem in problems[before:]):
                problems.append(Problem(entry.path, "empty_class", True, "a class folder without images"))
    if not classes:
        problems.append(Problem(str(split), "no_classes", True, "no class folders"))
    problems += _similar(split, classes)
    return images, classes


def _not_seen(entry: os.DirEntry[str], kind: str, where: str) -> Problem:
    """What to say of an entry that training passes over, or stops at because it is a link to a folder that is gone."""
    if is_lost_folder(entry):
        return Problem(entry.path, "dead_link", True, f"a link to {os.readlink(entry.path)}, which does not exist")
    kind = "hidden_file" if entry.name.startswith(".") else kind
    return Problem(entry.path, kind, False, f"{where}; training does not see it")


def _similar(split: Path, classes: set[str]) -> Iterator[Problem]:
    first: dict[str, str] = {}
    for name in sorted(classes):
        twin = first.setdefault(loose_name(name), name)
        if twin != name:
            detail = f"differs from the class {twin!r} in case, spaces or Unicode form only"
            yield Problem(str(split / name), "similar_classes", False, detail)


class _Walk:
    """Finds the images below folders and reports what is wrong on the way, each loop of links once."""

    def __init__(self, problems: list[Problem]) -> None:
        self._problems = problems
        self._loops: set[frozenset[FolderId]] = set()

    def images_below(self, folder: Path, above: frozenset[FolderId], way: tuple[FolderId, ...] = ()) -> Iterator[str]:
        """Paths of the images; `above` are all folders on the way to this one, `way` those since the class folder."""
        try:
            here = folder_id(folder)
        except OSError as error:
            self._problems.append(Problem(str(folder), "unreadable", True, error.strerror or str(error)))
            return
        if here in above:
            loop = frozenset(way[way.index(here) :] if here in way else (here,))
            if loop not in self._loops:
                detail = f"a link back to a folder it lies in ({folder.resolve()}); remove it"
                self._problems.append(Problem(str(folder), "link_loop", True, detail))
            self._loops.add(loop)
            return
        for entry in _entries(folder, self._problems):
            if is_folder(entry):
                if entry.name.startswith("."):
                    self._problems.append(Problem(entry.path, "hidden_folder", True, "inside a class; remove it"))
                else:
                    yield from self.images_below(Path(entry.path), above | {here}, (*way, here))
            elif is_image_name(entry.name):
                yield entry.path
            else:
                self._problems.append(_not_seen(entry, "not_image", "not named like an image"))


def _entries(folder: Path, problems: list[Problem]) -> list[os.DirEntry[str]]:
    try:
        return sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        problems.append(Problem(str(folder), "unreadable", True, error.strerror or str(error)))
        return []


def _compare_classes(splits: dict[str, Path], classes: dict[str, set[str]], problems: list[Problem]) -> None:
    if len(splits) < 2:
        return
    train, val = sorted(classes["train"]), sorted(classes["val"])
    for name in places_in(val, train)[1]:
        detail = f"no such class in {splits['train']}{likely_meant([name], train)}"
        problems.append(Problem(str(splits["val"] / name), "class_mismatch", True, detail))
    for name in places_in(train, val)[1]:
        detail = f"no such class in {splits['val']}; it is trained, and not evaluated"
        problems.append(Problem(str(splits["train"] / name), "not_validated", False, detail))


def _read_all(paths: Sequence[str], workers: int) -> Iterator[_Finding]:
    if workers <= 1 or len(paths) <= _CHUNK:
        yield from map(_read, paths)
        return
    with ProcessPoolExecutor(workers, initializer=helpers_first_call()) as pool:
        try:
            yield from pool.map(_read, paths, chunksize=_CHUNK)
        except BrokenProcessPool:
            raise UserError("a reading process was killed, likely for lack of memory; try fewer --workers") from None


def _read(path: str) -> _Finding:
    """Decode one file as training would, and compare its format with its name."""
    try:
        data = read_image_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header = open_image(data)
        image = decode_image(data)
    except BadImage as error:
        return _Finding(path, [Problem(path, error.kind, True, error.reason)], None)
    problems = []
    names = _NAMES_OF_FORMAT.get(header.format or "", ())
    if names and os.path.splitext(path)[1].lower() not in names:
        problems.append(Problem(path, "misnamed", False, f"its content is {header.format}"))
    if header.mode == "CMYK":
        problems.append(Problem(path, "cmyk", False, "converted to RGB without its colour profile"))
    if is_sixteen_bit(header):
        problems.append(Problem(path, "16bit", False, "16 bits a channel, reduced to 8"))
    digest = hashlib.blake2b(image.tobytes(), digest_size=16, salt=image.width.to_bytes(4, "little"))
    return _Finding(path, problems, digest.digest())


def _duplicates(train: Sequence[str], val: Sequence[str], content: dict[str, bytes]) -> Iterator[Problem]:
    first: dict[bytes, str] = {}
    for path in train:
        if path in content:
            first.setdefault(content[path], path)
    for path in val:
        twin = first.get(content[path]) if path in content else None
        if twin is not None:
            yield Problem(path, "duplicate", False, f"the same picture as {twin}")
