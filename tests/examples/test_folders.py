"""COCO and ADE20K in the layout of their archives."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from acmix.errors import UserError
from folders import ADE20K, coco


@pytest.fixture
def coco_folder(tmp_path: Path) -> Path:
    """Two images: one with a square, a crowd and a box without height, one with nothing."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "train2017").mkdir()
    for name, size in (("1.jpg", (40, 30)), ("2.jpg", (21, 33))):
        Image.new("RGB", size, (90, 120, 30)).save(tmp_path / "train2017" / name)
    square = {"bbox": [4, 5, 10, 8], "segmentation": [[4, 5, 14, 5, 14, 13, 4, 13]], "iscrowd": 0}
    crowd = {"bbox": [0, 0, 40, 30], "segmentation": {"size": [30, 40], "counts": [0, 1200]}, "iscrowd": 1}
    flat = {"bbox": [4, 5, 10, 0], "segmentation": [[4, 5, 14, 5, 14, 5, 4, 5]], "iscrowd": 0}
    found = [square, crowd, flat]
    annotations = {
        "images": [
            {"id": 7, "file_name": "1.jpg", "width": 40, "height": 30},
            {"id": 9, "file_name": "2.jpg", "width": 21, "height": 33},
        ],
        "categories": [{"id": 3, "name": "disc"}, {"id": 5, "name": "square"}],
        "annotations": [{"id": i, "image_id": 7, "category_id": 5, "area": 80, **a} for i, a in enumerate(found, 1)],
    }
    (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps(annotations))
    return tmp_path


def test_coco_for_training_has_the_images_with_objects_and_no_crowds(coco_folder: Path) -> None:
    images, _ = coco(coco_folder, "train2017", train=True)
    assert len(images) == 1
    image, target = images[0]
    assert (image.shape, image.dtype) == ((3, 30, 40), torch.float32)
    assert (target["image_id"], target["labels"].tolist()) == (7, [5])
    left, top, right, bottom = target["boxes"][0].int().tolist()
    assert (top, right - left, bottom) == (5, 10, 13)
    assert left in (4, 40 - 14)  # flipped or not
    assert target["masks"][0, top:bottom, left:right].all()


def test_coco_for_evaluation_has_every_image_and_the_whole_truth(coco_folder: Path) -> None:
    images, truth = coco(coco_folder, "train2017", train=False)
    assert [images[i][1]["image_id"] for i in range(len(images))] == [7, 9]
    assert len(truth.getAnnIds()) == 3


@pytest.fixture
def ade20k_folder(tmp_path: Path) -> Path:
    """One image of odd size; its left half is unlabelled, its right half is the first class."""
    for kind in ("images", "annotations"):
        (tmp_path / kind / "training").mkdir(parents=True)
    Image.new("RGB", (41, 25), (90, 120, 30)).save(tmp_path / "images" / "training" / "a.jpg")
    classes = np.zeros((25, 41), dtype=np.uint8)
    classes[:, 20:] = 1
    Image.fromarray(classes).save(tmp_path / "annotations" / "training" / "a.png")
    return tmp_path


def test_ade20k_classes_count_from_0_and_unlabelled_pixels_are_255(ade20k_folder: Path) -> None:
    image, classes = ADE20K(ade20k_folder, "training", 25, crop=False)[0]
    assert (image.shape, classes.shape) == ((3, 25, 41), (25, 41))
    assert classes[0, 19:21].tolist() == [255, 0]


def test_ade20k_for_training_is_cut_square_with_its_classes(ade20k_folder: Path) -> None:
    image, classes = ADE20K(ade20k_folder, "training", 50, crop=True)[0]
    assert (image.shape, classes.shape) == ((3, 50, 50), (50, 50))
    assert set(classes.unique().tolist()) <= {0, 255}


def test_what_is_missing_is_named(ade20k_folder: Path) -> None:
    with pytest.raises(UserError, match="images/validation"):
        ADE20K(ade20k_folder, "validation", 25, crop=False)
    (ade20k_folder / "annotations" / "training" / "a.png").unlink()
    with pytest.raises(UserError, match=r"a\.png"):
        ADE20K(ade20k_folder, "training", 25, crop=False)
    with pytest.raises(UserError, match=r"instances_val2017\.json"):
        coco(ade20k_folder, "val2017", train=False)
