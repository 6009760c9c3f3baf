"""A network described by its stages; and the ten networks of the paper against its table."""

import json

import pytest
import timm
import torch
from torch import nn

from acmix import ACmix
from acmix.models.acmix_san import ACmixSAN
from acmix.telemetry.describe import PARTS, as_table, describe, total
from acmix.telemetry.flops import count_like_san, count_multiply_adds, multiply_adds
from scripts import describe as program

# Millions of parameters and billions of multiply-adds as the paper prints them (tables 2 and 3).
PUBLISHED = {
    "acmix_resnet26": ("10.6", "2.3"),
    "acmix_resnet38": ("14.6", "2.9"),
    "acmix_resnet50": ("18.6", "3.6"),
    "acmix_san10": ("12.1", "1.9"),
    "acmix_san15": ("16.6", "2.7"),
    "acmix_san19": ("21.2", "3.4"),
    "acmix_pvt_tiny": ("13", "2.0"),
    "acmix_pvt_small": ("25", "3.9"),
    "acmix_swin_tiny": ("30", "4.6"),
    "acmix_swin_small": ("51", "9.0"),
}
LARGE = ("acmix_san15", "acmix_san19", "acmix_pvt_small", "acmix_swin_small")  # to count them takes seconds


def assert_published(value: float, printed: str) -> None:
    """Within 3 %, and half a unit of the last digit that was printed."""
    half_a_unit = 0.5 * 10.0 ** -len(printed.partition(".")[2])
    assert abs(value - float(printed)) <= 0.03 * float(printed) + half_a_unit


def test_all_ten_networks_of_the_paper_are_here_and_weigh_what_it_says() -> None:
    assert set(timm.list_models("acmix_*")) >= set(PUBLISHED)
    for name, (millions, _) in PUBLISHED.items():
        with torch.device("meta"):
            model = timm.create_model(name)
        assert_published(sum(parameter.numel() for parameter in model.parameters()) / 1e6, millions)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LARGE else n for n in PUBLISHED])
def test_a_network_costs_what_the_paper_says_by_the_counter_that_its_baseline_used(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
        count = count_like_san if isinstance(model, ACmixSAN) else count_multiply_adds
        assert_published(count(model, torch.zeros(1, 3, 224, 224)) / 1e9, PUBLISHED[name][1])


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("acmix_resnet26", {"base_width": 16, "layers": (1, 1, 1, 1)}),
        ("acmix_pvt_tiny", {"depths": (1, 1, 1, 2)}),
        ("acmix_swin_tiny", {"embed_dim": 24, "img_size": 64, "depths": (1, 1, 1, 1)}),
        ("resnet18", {}),
        ("vit_tiny_patch16_224", {"img_size": 64}),
    ],
)
def test_the_parts_of_all_stages_add_up_to_the_network(name: str, kwargs: dict[str, object]) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, **kwargs)
        stages = describe(model, (3, 64, 64))
        whole = total(stages)
        assert sum(whole.multiply_adds.values()) == multiply_adds(model, (3, 64, 64))
    assert sum(whole.parameters.values()) == sum(parameter.numel() for parameter in model.parameters())
    ours = name.startswith("acmix")
    for counts in (whole.parameters, whole.multiply_adds):
        assert all((counts[part] > 0) == ours for part in PARTS[:3] if (part, name) != ("attention", "acmix_pvt_tiny"))
    assert [stage.name for stage in stages][-1] == "head"


def test_a_block_is_split_into_its_projections_and_paths() -> None:
    channels, pixels = 16, 8 * 8
    model = nn.Sequential(nn.Conv2d(3, channels, 1), ACmix(channels, channels, 4, kernel_att=3))
    (stage,) = describe(model, (3, 8, 8))
    assert (stage.name, stage.map, stage.heads) == ("network", None, (4,))
    assert stage.multiply_adds == {
        "projections": 3 * channels**2 * pixels,
        "attention": 2 * 9 * channels * pixels,
        "convolution": (9 * 12 * channels // 4 + 81 * channels) * pixels,
        "rest": 3 * channels * pixels,
    }
    assert stage.parameters == {
        "projections": 3 * channels * (channels + 1),
        "attention": 2 * channels // 4,
        "convolution": 9 * 12 + 81 * channels,
        "rest": 4 * channels + 2,
    }


def test_stages_say_their_maps_and_heads_whatever_the_order_of_sides() -> None:
    shallow = (1, 1, 1, 1)
    wanted = {
        "acmix_resnet26": [(64, 32, 48), (256, 16, 24), (512, 8, 12), (1024, 4, 6), (2048, 2, 3), None],
        "swin_tiny_patch4_window7_224": [(96, 16, 24), (192, 8, 12), (384, 4, 6), (768, 2, 3), None],
        "acmix_pvt_tiny": [(64, 16, 24), (128, 8, 12), (320, 4, 6), (512, 2, 3), None],
    }
    for name, maps in wanted.items():
        with torch.device("meta"):
            more = {"layers": shallow} if "resnet" in name else {"depths": shallow, "img_size": (64, 96)}
            model = timm.create_model(name, **more)
            stages = describe(model, (3, 64, 96))
        assert [stage.map for stage in stages] == maps
    assert [stage.heads for stage in stages] == [(1,), (2,), (5,), (8,), ()]


def test_describing_leaves_the_network_as_it_was() -> None:
    model = timm.create_model("acmix_resnet26", base_width=8, stem="cifar").train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    table = as_table(describe(model, (3, 16, 16)))
    assert table.splitlines()[0].split() == ["parameters", "map", "heads", *PARTS, "total"]
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_program_prints_json_of_a_name_and_of_a_config(tmp_path, capsys) -> None:
    narrow = [
        "acmix_san10",
        "base_width=16",
        "layers=[1,1,1,1,1]",
        "num_classes=3",
        "--image-size",
        "[32, 64]",
        "--json",
    ]
    assert program.main(narrow) == 0
    by_name = json.loads(capsys.readouterr().out)
    assert by_name["input_size"] == [3, 32, 64]
    assert by_name["sans_counter"] > by_name["total"]["multiply_adds"]["total"]
    assert by_name["total"]["parameters"]["total"] == sum(s["parameters"]["total"] for s in by_name["stages"])
    config = tmp_path / "small.yaml"
    config.write_text(
        "model: {name: acmix_san10, num_classes: 3, kwargs: {base_width: 16, layers: [1, 1, 1, 1, 1]}}\n"
        "data: {dataset: digits, image_size: 16}\nschedule: {epochs: 1}\n"
    )
    assert program.main(["--config", str(config), "data.image_size=[32,64]", "--json"]) == 0
    of_config = json.loads(capsys.readouterr().out)
    assert of_config["stages"] == by_name["stages"]
    assert program.main([*narrow, "in_chans=null"]) == 0
    assert json.loads(capsys.readouterr().out)["input_size"] == [3, 32, 64]
    assert program.main(narrow[:-1]) == 0
    assert "by the counter of SAN's authors" in capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["acmix_resnet27"], "did you mean acmix_resnet26"),
        (["acmix_resnet26", "mixx=sum"], "did you mean mix?"),
        (["acmix_resnet26", "attention"], "is not of the form KEY=VALUE"),
        (["acmix_resnet26", "image_size=32"], "image_size: is no argument of a network; give --image-size N"),
        (["acmix_resnet26", "name=x"], "name: is no argument of a network; MODEL comes first"),
        (["acmix_resnet26", "num_classes=-5"], "num_classes: -5 must be a whole number"),
        (["mix=sum"], "give the name of a model first"),
        (["resnet18", "--image-size", "0"], "must be a number of at least 1"),
        (["vit_tiny_patch16_224", "--image-size", "50"], "takes no image of 3×50×50"),
        (["--config", "configs/quickstart.yaml", "--image-size", "8"], "give data.image_size=N"),
    ],
)
def test_the_program_refuses_what_it_cannot_describe(arguments: list[str], message: str, capsys) -> None:
    assert program.main(arguments) == 2
    assert message in capsys.readouterr().err
