"""`examples/detection.py`: what it trains, measures and draws."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import detection
from acmix.errors import UserError
from average_precision import encode_mask, evaluate, ground_truth
from shapes import CLASSES, Shapes
from training import train

NANO = ("--model", "acmix_swin_tiny", "embed_dim=12", "depths=[1,1,1,1]", "heads=[1,2,2,4]")
SMALL = (*NANO, "--size", "64", "--width", "16", "--batch", "2")


def result_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    assert detection.main([str(argument) for argument in arguments]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("head", ["retinanet", "maskrcnn"])
def test_it_trains_evaluates_and_draws(head, tmp_path, capsys):
    result = result_of(capsys, *SMALL, "--head", head, "--steps", 2, "--images", 2, "--out", tmp_path)
    assert (result["head"], result["steps"], result["images"]) == (head, 2, 2)
    assert {"box_map", "box_map50"} <= result.keys()
    assert ("mask_map" in result) == (head == "maskrcnn")
    with Image.open(tmp_path / "detections.png") as picture:
        assert picture.width >= 2 * 64


@pytest.mark.slow
@pytest.mark.parametrize("head", ["retinanet", "maskrcnn"])
@pytest.mark.parametrize("model", [NANO, ("--model", "acmix_resnet26", "base_width=16")], ids=["swin", "resnet"])
def test_the_loss_halves(head, model, tmp_path, capsys):
    result = result_of(capsys, *model, "--head", head, "--size", 128, "--width", 32, "--images", 8, "--out", tmp_path)
    first, last = result["loss"]
    assert last <= first / 2


def test_average_precision_is_100_for_the_truth_and_0_for_other_classes():
    images = Shapes(3, 48)
    truth = ground_truth(images, CLASSES)
    perfect = [
        {
            "image_id": index,
            "boxes": target["boxes"].numpy(),
            "labels": target["labels"].numpy(),
            "scores": np.ones(len(target["labels"])),
            "masks": [encode_mask(mask.numpy()) for mask in target["masks"]],
        }
        for index, (_, target) in enumerate(images[i] for i in range(len(images)))
    ]
    assert evaluate(truth, perfect) == {"box_map": 100.0, "box_map50": 100.0, "mask_map": 100.0, "mask_map50": 100.0}
    wrong = [{**image, "labels": image["labels"] % 3 + 1} for image in perfect]
    assert evaluate(truth, wrong)["mask_map"] < 20
    nothing = [{key: value[:0] if key != "image_id" else value for key, value in image.items()} for image in perfect]
    assert evaluate(truth, nothing)["box_map"] == 0


def test_shapes_have_tight_boxes_around_what_is_visible():
    for index in range(5):
        image, target = Shapes(5, 48, seed=3)[index]
        assert image.shape[1:] == target["masks"].shape[1:]
        assert target["masks"].sum(0).max() == 1
        for (left, top, right, bottom), mask in zip(target["boxes"].int().tolist(), target["masks"], strict=True):
            assert mask[top:bottom, left:right].sum() == mask.sum()
            assert mask[top, :].any()
            assert mask[bottom - 1, :].any()


def test_training_stops_when_the_loss_has_come_down_far_enough():
    model = torch.nn.Linear(1, 1)
    batches = torch.utils.data.DataLoader(torch.ones(8, 1), 4)
    losses = train(model, batches, lambda batch: (model(batch) - 3).square().mean(), steps=5000, until=0.5, lr=0.01)
    assert 10 < len(losses) < 5000
    assert sum(losses[-5:]) <= sum(losses[:5]) / 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--batch", "0"], "--batch: '0' is not a whole number above 0"),
        (["--steps", "0"], "--steps"),
        (["--images", "0"], "--images"),
        (["--width", "0"], "--width"),
        (["--size", "8"], "--size: 8 is less than 32 pixels"),
        (["--workers", "-1"], "--workers"),
        (["--seed", "-1"], "--seed"),
        (["--lr", "nan"], "--lr: 'nan' is not a number"),
        (["--until", "x"], "--until: 'x' is not a number"),
        (["base_width=8", "--steps", "1", "base_width=16"], "base_width: given twice"),
    ],
)
def test_bad_usage_is_one_message(arguments, told, tmp_path, capsys):
    assert detection.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    errors = capsys.readouterr().err
    assert told in errors
    assert errors.count("\n") == 1


def test_fewer_images_than_a_batch_holds_end_the_training_at_once():
    batches = torch.utils.data.DataLoader(torch.ones(3, 1), 4, drop_last=True)
    with pytest.raises(UserError, match="--batch 4: there are fewer images"):
        train(torch.nn.Linear(1, 1), batches, lambda batch: batch.sum(), steps=1, until=0.5, lr=0.01)


def test_coco_s_layout_is_trained_on_and_evaluated(tmp_path: Path, capsys):
    write_as_coco(tmp_path / "coco")
    result = result_of(
        capsys, *SMALL, "--coco", tmp_path / "coco", "--head", "maskrcnn", "--steps", 1, "--out", tmp_path
    )
    assert (result["steps"], result["images"]) == (1, 3)


def write_as_coco(folder: Path) -> None:
    """Three images of shapes in COCO's layout, for training and for evaluation; no object in the last of them."""
    (folder / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (folder / split).mkdir()
        images = Shapes(3, 64)
        truth = dict(ground_truth(images, CLASSES).dataset)
        for entry in truth["images"]:
            entry["file_name"] = f"{entry['id']}.jpg"
            pixels = (images[entry["id"]][0] * 255).byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(folder / split / entry["file_name"])
        truth["categories"] = truth["categories"][1:]
        truth["annotations"] = [entry for entry in truth["annotations"] if entry["image_id"] != 2]
        for entry in truth["annotations"]:
            entry["segmentation"] = {**entry["segmentation"], "counts": entry["segmentation"]["counts"].decode()}
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(truth))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"images": [], "annotations": [], "categories": []}'])
def test_annotations_that_are_not_coco_s_are_named(text, tmp_path: Path, capsys):
    write_as_coco(tmp_path)
    (tmp_path / "annotations" / "instances_val2017.json").write_text(text)
    assert detection.main(["--coco", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "instances_val2017.json: is no file of COCO's instances" in capsys.readouterr().err


def test_a_folder_without_coco_is_named(tmp_path: Path, capsys):
    assert detection.main(["--coco", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "instances_train2017.json" in capsys.readouterr().err
