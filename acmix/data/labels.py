"""Image folders whose classes are in a file (`data.labels`): a table of paths and labels, or a list in name order."""

import csv
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from acmix.data.classes import in_order, likely_meant, places_in
from acmix.data.folders import FileSource, image_files, missing_split, no_images, some
from acmix.data.text import read_text
from acmix.errors import UserError

Warn = Callable[[str], None]

_PATHS = ("path", "filepath", "imagepath", "filename", "file", "image", "imagename", "imageid", "img", "name", "id")
_LABELS = ("label", "labels", "class", "classname", "classid", "target", "category", "categoryid", "predictionstring")
_AMBIGUOUS = -1


@dataclass(frozen=True)
class Row:
    """One image in a labels file: the line it stands on, its path (empty in a list in name order), its label."""

    line: int
    image: str
    label: str


def labelled_source(
    root: Path,
    split: str,
    file: Path,
    known: Sequence[str] | None,
    count: int | None,
    warn: Warn,
    other_split: str | None = None,
) -> FileSource:
    """The images below `ROOT/SPLIT` that a labels file names, sorted by path; their classes are those that occur.

    file: lines of path and label (CSV, also with tabs, semicolons or spaces; with or without a header), or one label a
        line for all images in name order (ImageNet's ground truth)
    known: the classes that a label may name or count from 0, in order; None: the labels themselves are the names. In a
        list without any 0, numbers count from 1
    count: number of classes where their names are not known
    other_split: a split that the file is for as well; its images are passed over

    Raises UserError naming file and line of each mistake: an image that does not exist or is named twice, a label that
    is empty, unknown or out of range, a list of another length than there are images.
    """
    images = _Images(root, split)
    rows = read_labels(file, images)
    in_name_order = not rows[0].image
    if in_name_order:
        if len(rows) != len(images.files):
            raise UserError(
                f"data.labels: {file} has {len(rows)} labels for the {len(images.files)} images in {images.folder}; "
                "give one a line for each in name order, or lines of path,label"
            )
        places = list(range(len(rows)))
    else:
        elsewhere = other_split is not None and any(images.find(row.image) is None for row in rows)
        others = _Images(root, str(other_split)) if elsewhere and (root / str(other_split)).is_dir() else None
        rows, places = _find_images(file, rows, images, others)
        if len(rows) < len(images.files):
            left = len(images.files) - len(rows)
            warn(f"{left} of the {len(images.files)} images in {images.folder} have no label in {file}: left out")
    names = _class_names(file, rows, known, count, from_one=in_name_order, warn=warn)
    present = set(names)
    order = [name for name in known if name in present] if known else _order(present)
    number = {name: i for i, name in enumerate(order)}
    chosen = sorted((images.files[place], number[name]) for place, name in zip(places, names, strict=True))
    return FileSource(images.folder, order, [path for path, _ in chosen], [target for _, target in chosen])


def read_labels(file: Path, images: "_Images") -> list[Row]:
    """The rows of a labels file without its header. Raises UserError naming file and line."""
    text = read_text(file, "data.labels")
    first = text.lstrip().partition("\n")[0]
    delimiter = _delimiter(first, images)
    if delimiter is None:
        lines = text.rstrip().split("\n") if text.strip() else []
        rows = [Row(number, "", line.strip()) for number, line in enumerate(lines, start=1)]
    else:
        rows = _read_table(file, text, delimiter, images)
    if not rows:
        raise UserError(f"data.labels: {file} holds no labels")
    _refuse(file, [(row, "an empty label") for row in rows if not row.label])
    return rows


class _Images:
    """The images below a split folder, to be found by what a file may call them."""

    def __init__(self, root: Path, split: str) -> None:
        self.folder = root / split
        if not self.folder.is_dir():
            raise UserError(missing_split(self.folder))
        self.files = sorted(image_files(self.folder))
        if not self.files:
            raise UserError(no_images(self.folder))
        self._prefix = "" if split == "." else f"{PurePosixPath(split)}/"
        self._whole = {_canonical(path): place for place, path in enumerate(self.files)}
        stems = [_canonical(str(PurePosixPath(path).with_suffix(""))) for path in self.files]
        twice = {stem for stem, count in Counter(stems).items() if count > 1}
        self._stems = {stem: _AMBIGUOUS if stem in twice else place for place, stem in enumerate(stems)}

    def find(self, name: str) -> int | None:
        """Place of an image by its path below the split or the root, with or without suffix; None: there is none."""
        path = PurePosixPath(_canonical(name.replace("\\", "/")))
        if path.is_relative_to(self.folder.absolute()):
            path = path.relative_to(self.folder.absolute())
        keys = (str(path), str(path).removeprefix(self._prefix))
        return next((table[key] for key in keys for table in (self._whole, self._stems) if key in table), None)


def _delimiter(line: str, images: _Images) -> str | None:
    """What separates the columns; None: there is one column."""
    for mark in ("\t", ",", ";"):
        if mark in line:
            return mark
    first, _, rest = line.strip().partition(" ")
    return " " if rest and images.find(first) is not None else None


def _read_table(file: Path, text: str, delimiter: str, images: _Images) -> list[Row]:
    reader = csv.reader(text.splitlines(keepends=True), delimiter=delimiter, skipinitialspace=True, strict=True)
    lines: list[tuple[int, list[str]]] = []
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                lines.append((reader.line_num, [cell.strip() for cell in cells]))
    except csv.Error as error:
        raise UserError(f"data.labels: {file}:{reader.line_num}: not a valid table: {error}") from None
    if not lines:
        return []
    header = _is_header(lines, images)
    path, label = _columns(file, lines[0], named=header)
    width = len(lines[0][1])
    odd = [(Row(line, "", ""), f"{len(cells)} columns, not {width}") for line, cells in lines if len(cells) != width]
    _refuse(file, odd)
    rows = [Row(line, cells[path], cells[label]) for line, cells in lines[header:]]
    _refuse(file, [(row, "an empty path") for row in rows if not row.image])
    return [Row(row.line, row.image, _first_of_boxes(row.label)) for row in rows]


def _is_header(lines: Sequence[tuple[int, list[str]]], images: _Images) -> bool:
    """Whether the first line names columns: none of its cells is an image, a number or occurs again in its column."""
    cells = lines[0][1]
    if len(lines) == 1 or any(images.find(cell) is not None or _number(cell) is not None for cell in cells):
        return False
    if any(_plain(cell) in (*_PATHS, *_LABELS) for cell in cells):
        return True
    return not any(cell == other for _, others in lines[1:] for cell, other in zip(cells, others, strict=False))


def _columns(file: Path, first: tuple[int, list[str]], *, named: bool) -> tuple[int, int]:
    """Which columns hold path and label."""
    line, cells = first
    if len(cells) == 2 and not (named and _plain(cells[0]) in _LABELS and _plain(cells[1]) in _PATHS):
        return 0, 1
    names = [_plain(cell) for cell in cells]
    path = next((names.index(name) for name in _PATHS if named and name in names), None)
    label = next((names.index(name) for name in _LABELS if named and name in names), None)
    if path is None or label is None:
        raise UserError(
            f"data.labels: {file}:{line}: {len(cells)} columns; give lines of path,label, or a header that calls two "
            "of the columns path and label"
        )
    return path, label


def _first_of_boxes(label: str) -> str:
    """The class of ImageNet's boxes in Kaggle's form, "n01440764 x y x y n01440764 x y x y"; other labels as they are.

    Every box of an image is of the same class.
    """
    match = re.fullmatch(r"(\S+)( -?\d+){4}( \1( -?\d+){4})*", label)
    return match[1] if match else label


def _find_images(
    file: Path, rows: Sequence[Row], images: _Images, others: _Images | None
) -> tuple[list[Row], list[int]]:
    """The rows on images of the split, and the place of each among its files."""
    kept: list[Row] = []
    places: list[int] = []
    first: dict[int, int] = {}
    wrong: list[tuple[Row, str]] = []
    for row in rows:
        place = images.find(row.image)
        if place is None and others is not None and others.find(row.image) is not None:
            continue
        if place is None:
            wrong.append((row, f"no image {row.image!r} in {images.folder}"))
        elif place == _AMBIGUOUS:
            wrong.append((row, f"{row.image!r} is the name of several images in {images.folder}; give its suffix"))
        elif place in first:
            wrong.append((row, f"{row.image!r} is named on line {first[place]} already"))
        else:
            first[place] = row.line
            kept.append(row)
            places.append(place)
    _refuse(file, wrong)
    if not kept:
        raise UserError(
            f"data.labels: {file} names no image in {images.folder}; where each split has a file of its own, write "
            "{split} for train and val in its name"
        )
    return kept, places


def _class_names(
    file: Path, rows: Sequence[Row], known: Sequence[str] | None, count: int | None, *, from_one: bool, warn: Warn
) -> list[str]:
    """The class of each row. Labels are names; where they are not, and all are numbers, they count through `known`."""
    labels = [row.label for row in rows]
    numbers = [number for number in map(_number, labels) if number is not None]
    if known is not None:
        places, unknown = places_in(labels, known)
        if not unknown:
            return [known[place] for place in places]
    if len(numbers) < len(rows):
        if known is None:
            return labels
        strange = [row for row, place in zip(rows, places, strict=True) if place < 0]
        text = f"is none of the {len(known)} classes ({some(known)})"
        _refuse(file, [(row, f"{row.label!r} {text}{likely_meant([row.label], known)}") for row in strange])
    if known is None:
        if count is None or count <= len(set(numbers)):
            return [str(number) for number in numbers]
        known = [str(number) for number in range(count)]
    start = int(from_one and 0 not in numbers)
    last = len(known) - 1 + start
    text = f"is out of range: the {len(known)} classes have the numbers {start} to {last}"
    numbered = zip(rows, numbers, strict=True)
    _refuse(file, [(row, f"label {number} {text}") for row, number in numbered if not start <= number <= last])
    if start:
        warn(f"the numbers in {file} count from 1, as none of them is 0")
    return [known[number - start] for number in numbers]


def _order(names: set[str]) -> list[str]:
    """Numbers as numbers, because the label k means the model's output k; names as everywhere."""
    if all(name.lstrip("-").isdecimal() for name in names):
        return sorted(names, key=int)
    return in_order(list(names), "sorted")


def _number(label: str) -> int | None:
    """The integer that a label is, also as spreadsheets and pandas write it (`3.0`)."""
    return int(float(label)) if re.fullmatch(r"-?[0-9]{1,9}(\.0+)?", label) else None


def _canonical(path: str) -> str:
    return unicodedata.normalize("NFC", path)


def _plain(title: str) -> str:
    return re.sub(r"[\W_]", "", title).lower()


def _refuse(file: Path, wrong: Sequence[tuple[Row, str]]) -> None:
    """Raises UserError naming the lines that are wrong, if there are any."""
    if wrong:
        raise UserError(f"data.labels: {some([f'{file}:{row.line}: {text}' for row, text in wrong])}")
