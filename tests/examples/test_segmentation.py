"""`examples/segmentation.py`: what it trains, measures and draws."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import segmentation
from backbone import FeatureMaps

NANO = ("--model", "acmix_swin_tiny", "embed_dim=12", "depths=[1,1,1,1]", "heads=[1,2,2,4]")
SMALL = (*NANO, "--size", "48", "--width", "16", "--head-width", "16", "--batch", "2")


def result_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    assert segmentation.main([str(argument) for argument in arguments]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_it_trains_until_the_loss_has_halved_evaluates_and_draws(tmp_path, capsys):
    result = result_of(capsys, *SMALL, "--images", 3, "--lr", 0.003, "--out", tmp_path)
    first, last = result["loss"]
    assert last <= first / 2
    assert 0 < result["miou"] < result["pixel_accuracy"] <= 100
    with Image.open(tmp_path / "segmentation.png") as picture:
        assert picture.width > 3 * 48
        assert picture.height > 3 * 48


@pytest.mark.parametrize("size", [(128, 165), (131, 129)])
def test_logits_have_the_size_of_the_image(size):
    model = segmentation.SemanticFPN(FeatureMaps("acmix_resnet26", base_width=8), 5, width=8, head_width=8)
    assert model(torch.rand(1, 3, *size)).shape == (1, 5, *size)


def test_the_head_climbs_once_a_level_as_published():
    model = segmentation.SemanticFPN(FeatureMaps("acmix_resnet26", base_width=8), 5)
    assert [len(climb) for climb in model.climbs] == [1, 1, 2, 3]
    assert {conv[0].out_channels for climb in model.climbs for conv in climb} == {128}


def test_mean_intersection_over_union_leaves_out_classes_that_do_not_occur():
    confusion = torch.tensor([[6, 2, 0], [0, 4, 0], [0, 0, 0]])
    assert segmentation.mean_intersection_over_union(confusion) == pytest.approx((6 / 8 + 4 / 6) / 2)


def test_pixels_that_padding_adds_are_not_learned():
    small, large = (torch.rand(3, *size) for size in ((5, 9), (7, 6)))
    images, classes = segmentation.collate([(small, torch.ones(5, 9).long()), (large, torch.zeros(7, 6).long())])
    assert images.shape == (2, 3, 7, 9)
    assert (classes == segmentation.UNLABELLED).sum() == 2 * 9 + 7 * 3


def test_ade20k_s_layout_is_trained_on_and_evaluated(tmp_path: Path, capsys):
    for split in ("training", "validation"):
        drawn = segmentation.SemanticShapes(2, 48, 0)
        for kind in ("images", "annotations"):
            (tmp_path / "ade" / kind / split).mkdir(parents=True)
        for index in range(2):
            image, classes = drawn[index]
            pixels = (image * 255).byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(tmp_path / "ade" / "images" / split / f"{index}.jpg")
            Image.fromarray(classes.byte().numpy()).save(tmp_path / "ade" / "annotations" / split / f"{index}.png")
    result = result_of(capsys, *SMALL, "--ade20k", tmp_path / "ade", "--steps", 1, "--out", tmp_path)
    assert (result["steps"], result["images"]) == (1, 2)
