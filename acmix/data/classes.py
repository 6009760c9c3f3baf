"""Class names: their order, the file that lists them, and targets of one list turned into those of another by name."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from acmix.data.folders import some
from acmix.data.text import read_text
from acmix.errors import UserError

if TYPE_CHECKING:
    from acmix.data.datasets import Source


def in_order(names: Sequence[str], order: str | None) -> list[str]:
    """The names `sorted` as text (torchvision), `natural` (timm: digits as numbers, case ignored) or as they are."""
    if order is None:
        return list(names)
    return sorted(sorted(names), key=_natural) if order == "natural" else sorted(names)


def read_classes(path: Path) -> list[str]:
    """The class names in a file, in its order: one a line, or a JSON list of strings.

    Raises UserError naming the file and the line (in JSON the entry) of a name that is empty or given twice.
    """
    text = read_text(path, "data.classes")
    if path.suffix.lower() == ".json" or text.lstrip().startswith("["):
        places = [(f"{path}: entry {i}", name) for i, name in enumerate(_json_list(path, text))]
    else:
        places = [(f"{path}:{i}", line.strip()) for i, line in enumerate(text.rstrip().split("\n"), start=1)]
    if not text.strip() or not places:
        raise UserError(f"data.classes: {path} lists no classes")
    first: dict[str, str] = {}
    for place, name in places:
        if not name.strip():
            raise UserError(f"{place}: an empty class name; write one name a line")
        if (key := _canonical(name)) in first:
            raise UserError(f"{place}: the class {name!r} is listed already, {first[key]}")
        first[key] = place
    return [name for _, name in places]


def places_in(classes: Sequence[str], known: Sequence[str]) -> tuple[list[int], list[str]]:
    """Index in `known` of each class, by name, and the classes that are not there (index -1).

    Names that differ only in their Unicode normal form or in spaces around them are the same. Raises UserError for a
    name that `known` holds twice, because the class it means cannot be told.
    """
    if list(classes) == list(known):
        return list(range(len(known))), []
    twice = [name for name, count in Counter(known).items() if count > 1]
    if twice:
        raise UserError(
            f"{'same classes, other order' if same_names(classes, known) else 'other classes'}: they cannot be matched "
            f"by name, because {some(twice)} is the name of more than one; give the data the order of training"
        )
    exact = {name: i for i, name in enumerate(known)}
    spellings = Counter(map(_canonical, known))
    same = {_canonical(name): i for i, name in enumerate(known) if spellings[_canonical(name)] == 1}
    found = [exact.get(name, same.get(_canonical(name), -1)) for name in classes]
    return found, [name for name, place in zip(classes, found, strict=True) if place < 0]


def same_names(classes: Sequence[str], known: Sequence[str]) -> bool:
    """Whether both lists hold the same names, in any order."""
    return sorted(map(_canonical, classes)) == sorted(map(_canonical, known))


def likely_meant(unknown: Sequence[str], known: Sequence[str]) -> str:
    """For a message: which known names the unknown ones come close to; empty where there are none."""
    loose = {loose_name(name): name for name in known}
    close = [f"{name!r} for {loose[loose_name(name)]!r}" for name in unknown if loose_name(name) in loose]
    return f" (they differ in case or spaces only: {some(close)})" if close else ""


def check_val_classes(train: Sequence[str], val: Sequence[str], train_name: str, val_name: str) -> None:
    """Raises UserError where the validation split has classes that training lacks, naming those of either alone."""
    unknown = places_in(val, train)[1]
    if not unknown:
        return
    only_train = places_in(train, val)[1]
    parts = [f"only in {train_name}: {some(only_train)}"] * bool(only_train) + [f"only in {val_name}: {some(unknown)}"]
    raise UserError(
        f"training and validation classes differ: {'; '.join(parts)}{likely_meant(unknown, train)}; rename or remove "
        "what only validation has, or name all classes with data.classes=FILE"
    )


def check_trained_classes(classes: Sequence[str], trained: Sequence[str]) -> None:
    """Raises UserError where the classes to evaluate on are not all among those of training."""
    unknown = places_in(classes, trained)[1]
    if unknown:
        only_trained = [name for name in trained if name not in set(classes)]
        raise UserError(
            f"the data's {len(classes)} classes are not the {len(trained)} of training: missing here "
            f"{only_trained[:5]}, unknown there {unknown[:5]}{likely_meant(unknown, trained)}; rename or leave out "
            "what is unknown (a part of the classes of training is enough)"
        )


class Renumbered:
    """A source whose targets are indices into another list of classes, which may hold more than its own.

    source: any source
    classes: the list; every class of the source must be in it, by name

    Raises UserError naming the classes that are not.
    """

    def __init__(self, source: "Source", classes: Sequence[str]) -> None:
        places, unknown = places_in(source.classes, classes)
        if unknown:
            raise UserError(f"unknown classes: {some(unknown)}{likely_meant(unknown, classes)}")
        self.classes = list(classes)
        self.source = source
        self._places = np.asarray(places, dtype=np.int64)

    @property
    def present(self) -> list[int]:
        """Indices of the classes that the source names, ascending."""
        return sorted(set(self._places.tolist()))

    @property
    def targets(self) -> np.ndarray | None:
        """The class of each image, (N,), where the source knows them."""
        known = getattr(self.source, "targets", None)
        return None if known is None or class_counts(self.source) is None else self._places[np.asarray(known)]

    def __len__(self) -> int:
        return len(self.source)

    def load(self, index: int) -> tuple[Image.Image, int]:
        """Decoded RGB image and class index. Raises BadImage."""
        image, target = self.source.load(index)
        return image, int(self._places[target])

    def read(self, index: int) -> tuple[bytes, int]:
        """The bytes of an image file and its class index, of a source of files. Raises BadImage."""
        data, target = self.source.read(index)  # type: ignore[attr-defined]
        return data, int(self._places[target])

    def describe(self, index: int) -> str:
        """Where the image is and its class, for messages."""
        return self.source.describe(index)

    def fingerprint(self) -> str | None:
        """What tells the images from all others, where the source knows it."""
        known: str | None = getattr(self.source, "fingerprint", lambda: None)()
        return None if known is None else f"{known} {self._places.tolist()}"


def present_classes(source: "Source") -> list[int]:
    """Indices of the classes that a source may hold images of, ascending."""
    return source.present if isinstance(source, Renumbered) else list(range(len(source.classes)))


def class_counts(source: "Source") -> np.ndarray | None:
    """Images of each class, (C,), by the source's `targets` (N,); None for a source without, or with other ones."""
    targets = getattr(source, "targets", None)
    if targets is None or (values := np.asarray(targets)).shape != (len(source),):
        return None
    known = values.dtype.kind in "iu" and values.min() >= 0 and values.max() < len(source.classes)
    return np.bincount(values, minlength=len(source.classes)) if known else None


def _natural(name: str) -> list[Any]:
    parts = re.split(r"(\d+)", name.lower())  # text and numbers take turns, so that like is compared with like
    return [int(part) if place % 2 else part for place, part in enumerate(parts)]


def _canonical(name: str) -> str:
    return unicodedata.normalize("NFC", name).strip()


def loose_name(name: str) -> str:
    """A class name without what people overlook: case, spaces, Unicode normal form."""
    return " ".join(_canonical(name).casefold().split())


def _json_list(path: Path, text: str) -> list[str]:
    try:
        names = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: must be a JSON list of class names, like the classes.json of a run")
    return names
