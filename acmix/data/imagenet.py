"""ImageNet (ILSVRC 2012) as it is handed out: a tar of tars to train on, a flat tar and a list of labels to validate.

Both tars are read in place; nothing is unpacked.
"""

import csv
import io
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from acmix.config import DataConfig
from acmix.data.datasets import data_root
from acmix.data.folders import from_where, is_image_name, some
from acmix.data.tars import Member, TarSource, index_tar, tar_source
from acmix.data.text import read_text
from acmix.errors import UserError

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"

_DEVKIT = "ILSVRC2012_devkit_t12"
_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_KAGGLE = "LOC_val_solution.csv"
_SYNSETS = "imagenet_2012_validation_synset_labels.txt"
_ID = re.compile(r"n[0-9]{8}")


def open_imagenet(data: DataConfig, split: str) -> TarSource:
    """`ROOT/ILSVRC2012_img_train.tar` as the split train, `ROOT/ILSVRC2012_img_val.tar` as val.

    The classes are the WordNet ids. Those of validation come from a file beside the tar, whichever is there:
    ILSVRC2012_devkit_t12.tar.gz (or the folder it unpacks to), LOC_val_solution.csv (Kaggle), or
    imagenet_2012_validation_synset_labels.txt (an id a line). Raises UserError naming what is missing or does not fit.
    """
    root = data_root(data)
    if split not in ("train", "val"):
        raise UserError(f"dataset imagenet: no split {split!r}; it has train and val")
    path = root / (TRAIN_TAR if split == "train" else VAL_TAR)
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; set data.root to the folder with the official tar files{from_where(root)}"
        )
    return tar_source(path, split) if split == "train" else _validation(path)


def _validation(path: Path) -> TarSource:
    members = [member for member in index_tar(path) if is_image_name(PurePosixPath(member.name).name)]
    members.sort(key=lambda member: PurePosixPath(member.name).name)
    if not members:
        raise UserError(f"{path}: no images inside")
    return TarSource([path], [(0, member) for member in members], _labels(path.parent, members))


def _labels(root: Path, members: Sequence[Member]) -> list[str]:
    """The id of each image, which are in the order of their names."""
    if (root / _KAGGLE).is_file():
        return _labels_by_name(root / _KAGGLE, members)
    if (root / _SYNSETS).is_file():
        source, labels = root / _SYNSETS, read_text(root / _SYNSETS, "data.root").split()
        wrong = [label for label in labels if not _ID.fullmatch(label)]
        if wrong:
            raise UserError(f"{source}: {some(wrong)}: not WordNet ids such as n01440764")
    else:
        source, truth, ids = _read_devkit(root)
        numbers = [int(number) if number.isdecimal() else 0 for number in truth.split()]
        wrong = [str(number) for number in numbers if number not in ids]
        if wrong:
            raise UserError(f"{source}: {_TRUTH}: {some(wrong)}: not the number of a class, 1 to {len(ids)}")
        labels = [ids[number] for number in numbers]
    if len(labels) != len(members):
        raise UserError(f"{source}: {len(labels)} labels for the {len(members)} images in {root / VAL_TAR}")
    return labels


def _labels_by_name(path: Path, members: Sequence[Member]) -> list[str]:
    rows = [row for row in csv.reader(read_text(path, "data.root").splitlines()) if len(row) == 2]
    found = {name: match[0] for name, text in rows if (match := _ID.match(text))}
    stems = [PurePosixPath(member.name).stem for member in members]
    missing = [stem for stem in stems if stem not in found]
    if missing:
        raise UserError(f"{path}: names no class of {some(missing)}")
    return [found[stem] for stem in stems]


def _read_devkit(root: Path) -> tuple[Path, str, dict[int, str]]:
    """Where it is, the text of the ground truth, and the id of each number in that."""
    folder, archive = root / _DEVKIT, root / f"{_DEVKIT}.tar.gz"
    if folder.is_dir():
        source, files = folder, {name: folder / "data" / name for name in (_TRUTH, "meta.mat")}
        absent = [str(path) for path in files.values() if not path.is_file()]
        if absent:
            raise UserError(f"{some(absent)}: no such file; unpack {archive.name} once more")
        contents = {name: path.read_bytes() for name, path in files.items()}
    elif archive.is_file():
        source, contents = archive, _read_archive(archive)
    else:
        raise UserError(
            f"{root}: no labels for {VAL_TAR}; put one of {archive.name}, {_KAGGLE} or {_SYNSETS} beside it"
        )
    return source, contents[_TRUTH].decode("ascii", "replace"), _class_ids(source, contents["meta.mat"])


def _read_archive(archive: Path) -> dict[str, bytes]:
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                name = PurePosixPath(member.name).name
                if name in (_TRUTH, "meta.mat") and member.isfile() and member.size < 1 << 26:
                    contents[name] = tar.extractfile(member).read()  # type: ignore[union-attr]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{archive}: not a readable tar.gz file: {error}") from None
    if len(contents) < 2:
        raise UserError(f"{archive}: holds no {_TRUTH} or no meta.mat; download it again")
    return contents


def _class_ids(source: Path, matrix: bytes) -> dict[int, str]:
    """The WordNet id of each class number; synsets above the classes have children and are left out."""
    from scipy.io import loadmat  # comes with scikit-learn; slow to import

    try:
        table = loadmat(io.BytesIO(matrix), squeeze_me=True)["synsets"]
        rows = zip(table["ILSVRC2012_ID"], table["WNID"], table["num_children"], strict=True)
        return {int(number): str(name) for number, name, children in rows if int(children) == 0}
    except (ValueError, LookupError, TypeError, OSError) as error:
        raise UserError(f"{source}: meta.mat cannot be read: {error}") from None
