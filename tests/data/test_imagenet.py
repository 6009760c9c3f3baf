"""ImageNet's official files: tars read in place, labels of validation from whichever list is there."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from acmix.config import Config
from acmix.data.datasets import build_sources
from acmix.errors import UserError

MakeConfig = Callable[..., Config]
IDS = ["n02119789", "n02100735", "n01440764"]
"""The classes 1, 2 and 3 of the devkit; sorted, they are in the opposite order."""

TRUTH = [3, 1, 2, 3]


def jpeg(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value,) * 3).save(buffer, "JPEG", quality=100)
    return buffer.getvalue()


def tar_of(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def meta() -> bytes:
    """Synsets as the devkit's meta.mat has them: the classes first, then one above them that has children."""
    fields = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("num_children", object)]
    rows = [(number, name, "words", 0) for number, name in enumerate(IDS, start=1)] + [(4, "n00001740", "entity", 3)]
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": np.array(rows, dtype=fields).reshape(-1, 1)})
    return buffer.getvalue()


def devkit() -> dict[str, bytes]:
    folder = "ILSVRC2012_devkit_t12/data"
    truth = "\n".join(map(str, TRUTH)) + "\n"
    return {
        f"{folder}/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
        f"{folder}/meta.mat": meta(),
        "ILSVRC2012_devkit_t12/readme.txt": b"x",
    }


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """Two training images of each class, four of validation, and the devkit."""
    train = {
        f"{name}.tar": tar_of({f"{name}_{i}.JPEG": jpeg(10 * place + i) for i in (1, 2)})
        for place, name in enumerate(IDS, start=1)
    }
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(tar_of(train))
    val = {f"ILSVRC2012_val_{i:08}.JPEG": jpeg(100 + i) for i in (3, 1, 4, 2)}
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(tar_of(val))
    (tmp_path / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(tar_of(devkit(), "w:gz"))
    return tmp_path


def found(config: Config) -> list[list[tuple[int, str]]]:
    """Grey value and class name of each image of training and validation."""
    *sources, _ = build_sources(config)
    loaded = [[source.load(i) for i in range(len(source))] for source in sources]
    return [[(int(np.asarray(image)[0, 0, 0]), sources[0].classes[target]) for image, target in one] for one in loaded]


EXPECTED_TRAIN = [(10 * place + i, name) for place, name in enumerate(IDS, start=1) for i in (1, 2)]
EXPECTED_VAL = [(100 + i, IDS[number - 1]) for i, number in enumerate(TRUTH, start=1)]


@pytest.mark.parametrize("labels", ["archive", "folder", "kaggle", "synsets"])
def test_the_official_files_are_read_with_any_list_of_labels(
    labels: str, official: Path, make_config: MakeConfig
) -> None:
    archive, names = official / "ILSVRC2012_devkit_t12.tar.gz", [IDS[number - 1] for number in TRUTH]
    if labels == "folder":
        for name, data in devkit().items():
            (official / name).parent.mkdir(parents=True, exist_ok=True)
            (official / name).write_bytes(data)
    elif labels == "kaggle":
        lines = [f"ILSVRC2012_val_{i:08},{name} 1 2 3 4 " for i, name in enumerate(names, start=1)]
        (official / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *lines[::-1]]))
    elif labels == "synsets":
        (official / "imagenet_2012_validation_synset_labels.txt").write_text("\n".join(names))
    if labels != "archive":
        archive.unlink()
    train, val = found(make_config(data__dataset="imagenet", data__root=official))
    assert sorted(train) == sorted(EXPECTED_TRAIN)
    assert val == EXPECTED_VAL, "in the order of their names"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("ILSVRC2012_img_val.tar", None, r"img_val.tar: no such file; set data.root"),
        ("ILSVRC2012_devkit_t12.tar.gz", None, r"no labels for ILSVRC2012_img_val.tar; put one of ILSVRC2012_devkit"),
        ("ILSVRC2012_devkit_t12.tar.gz", b"x" * 100, "not a readable tar.gz file"),
        ("ILSVRC2012_devkit_t12.tar.gz", tar_of({"a/meta.mat": meta()}, "w:gz"), "no ILSVRC2012_validation_ground"),
        ("LOC_val_solution.csv", b"ILSVRC2012_val_00000002,n02119789 1 2 3 4", "names no class of ILSVRC2012_val_0000"),
        ("imagenet_2012_validation_synset_labels.txt", b"n02119789\n" * 3, "3 labels for the 4 images"),
        ("imagenet_2012_validation_synset_labels.txt", b"1\n2\n3\n1\n", "1, 2, 3, 1: not WordNet ids"),
    ],
)
def test_what_is_missing_or_does_not_fit_is_named(
    file: str, content: bytes | None, message: str, official: Path, make_config: MakeConfig
) -> None:
    if content is None:
        (official / file).unlink()
    else:
        (official / file).write_bytes(content)
    with pytest.raises(UserError, match=message):
        build_sources(make_config(data__dataset="imagenet", data__root=official))
