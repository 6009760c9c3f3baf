"""What is particular to ACmix-PVT: the class token, the reduced maps, sizes, what the convolution path gets."""

import copy
import io

import pytest
import timm
import torch
from timm.models._features_fx import get_notrace_modules
from torch import nn

from acmix import fuse
from acmix.layers import PathMix
from acmix.models import acmix_pvt
from acmix.models.acmix_pvt import checkpoint_filter_fn
from acmix.telemetry.probes.paths import path_layers

SMALL = {"num_classes": 5, "embed_dims": (8, 8, 16, 16), "heads": (1, 1, 2, 2), "img_size": 32, "patch_size": 2}


def build(**kwargs) -> acmix_pvt.ACmixPVT:
    torch.manual_seed(0)
    return timm.create_model("acmix_pvt_tiny", **{**SMALL, **kwargs}).eval()


def images(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *(size or (32, 32)), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "parameters"), [("acmix_pvt_tiny", 13_229_288), ("acmix_pvt_small", 24_485_864)])
def test_the_plain_twin_weighs_what_pvt_weighs(name, parameters):
    with torch.device("meta"):
        plain = timm.create_model(name, mix="attention")
    assert sum(parameter.numel() for parameter in plain.parameters()) == parameters


def pvt_by_hand(model: acmix_pvt.ACmixPVT, x: torch.Tensor) -> torch.Tensor:
    """PVT v1 on the weights of a plain twin: tokens in rows all the way, as its authors compute it."""
    for index, stage in enumerate(model.stages):
        patches = nn.functional.conv2d(x, stage.proj.weight, stage.proj.bias, stage.patch_size)
        height, width = patches.shape[-2:]
        rows = nn.functional.layer_norm(
            patches.flatten(2).mT, patches.shape[1:2], stage.norm.weight, stage.norm.bias, 1e-5
        )
        rows = rows + stage.pos_embed.flatten(2).mT
        if index == 3:
            rows = torch.cat(((stage.cls_token + stage.cls_pos_embed).expand(len(x), -1, -1), rows), 1)
        for block in stage.blocks:
            assert block.norm1.eps == block.norm2.eps == 1e-6
            path, normed = block.acmix.attention, block.norm1(rows)
            if path.reduction > 1:
                smaller = path.reducing(normed.mT.unflatten(2, (height, width))).flatten(2).mT
                q, (k, v) = block.acmix.q(normed), block.acmix.kv(path.norm(smaller)).chunk(2, 2)
            else:
                q, k, v = block.acmix.qkv(normed).chunk(3, 2)
            q, k, v = (m.unflatten(2, (path.heads, -1)).transpose(1, 2) for m in (q, k, v))
            attended = ((q @ k.mT) * path.head_dim**-0.5).softmax(-1) @ v
            rows = rows + path.proj(attended.transpose(1, 2).flatten(2))
            rows = rows + block.mlp(block.norm2(rows))
        x = rows[:, -height * width :].mT.unflatten(2, (height, width))
    return model.head(model.norm(rows)[:, 0])


def test_the_plain_twin_computes_what_pvt_computes():
    model = build(mix="attention").double()
    torch.testing.assert_close(model(images().double()), pvt_by_hand(model, images().double()))


@pytest.mark.parametrize("size", [(32, 32), (64, 40), (45, 37), (7, 90), (1, 1)])
@pytest.mark.parametrize("conv_shares", ["qkv", "q"])
def test_images_of_any_size_and_shape_are_taken(size, conv_shares):
    model = build(conv_shares=conv_shares)
    assert model(images(*size)).shape == (2, 5)
    maps = model.forward_intermediates(images(*size), intermediates_only=True)
    assert [map_.shape[1] for map_ in maps] == [8, 8, 16, 16]


def test_positions_of_another_size_are_interpolated_at_the_call_and_on_loading():
    for_32, for_64 = build().double(), build(img_size=(64, 48)).double()
    for_64.load_state_dict(checkpoint_filter_fn(for_32.state_dict(), for_64))
    torch.testing.assert_close(for_64(images(64, 48).double()), for_32(images(64, 48).double()))


def test_every_block_mixes_but_the_last_whose_map_nobody_reads():
    modes = [module.mode for module in build().modules() if isinstance(module, PathMix)]
    assert modes == ["learned"] * 7 + ["attention"]
    rows = path_layers(build())
    assert [(row["stage"], row["depth"]) for row in rows] == [(1, 1), (1, 2), (2, 3), (2, 4), (3, 5), (3, 6), (4, 7)]
    assert all(row["beta"] == 0.5 for row in rows)
    assert len(path_layers(build(mix="attention"))) == 8
    modes = [module.mode for module in build(class_token=False).modules() if isinstance(module, PathMix)]
    assert modes == ["learned"] * 8


def test_the_head_reads_the_token_or_the_map():
    model = build()
    features = model.forward_features(images())
    assert features.shape == (2, 1, 1 + 2 * 2, 16)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features[:, 0, 0])
    model.reset_classifier(0, "avg")
    torch.testing.assert_close(model(images()), features[:, 0, 1:].mean(1))
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(images()), features)
    for kwargs in ({"class_token": False}, {"mix": "convolution"}):
        model = build(**kwargs)
        assert model.global_pool == "avg"
        assert not [name for name, _ in model.named_parameters() if "cls" in name]
        with pytest.raises(ValueError, match="there is no class token here"):
            model.reset_classifier(3, "token")


def test_dropping_a_path_drops_the_token_and_the_map_of_an_image_together():
    block = build(drop_path_rate=0.5).stages[-1].blocks[0].train()
    x = torch.randn(64, 5, 16)
    unchanged = (block(x, 2, 2) == x).flatten(1)
    assert set(unchanged.float().mean(1).tolist()) <= {0.0, 1.0}


def test_positions_are_decayed_and_the_class_token_is_not():
    spared = build().no_weight_decay()
    assert "stages.3.cls_token" in spared
    assert not [name for name in spared if "pos_embed" in name]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"heads": (1, 1, 2, 3)}, "16 channels do not divide into 3 heads"),
        ({"depths": (1, 1, 1)}, "one number a stage"),
        ({"reductions": (8, 4, 2, 0)}, "reductions must be at least 1"),
        ({"reductions": (8, 4, 2, 2)}, "a class token attends to a map that is not reduced"),
        ({"global_pool": "catavgmax"}, "choose token, avg, max"),
        ({"conv_shares": "v"}, "choose qkv or q"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(**kwargs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs_as_a_whole_and_copies_and_files_hold_the_module(dtype):
    model = build()
    exact = model.double()(images().double())
    half = copy.deepcopy(model).to(dtype)
    # three roundings for each of the eight blocks and the ends, of a value of about one
    torch.testing.assert_close(half(images().to(dtype)).double(), exact, rtol=0, atol=30 * torch.finfo(dtype).eps)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)  # written two lines above
    assert torch.equal(again(images().double()), exact)


def test_a_fused_copy_gives_the_same():
    model = build().double()
    torch.testing.assert_close(fuse(model)(images().double()), model(images().double()))


class Timms(torch.fx.Tracer):
    """Does not look into the modules that timm's tracer does not look into."""

    def is_leaf_module(self, m: nn.Module, name: str) -> bool:
        return isinstance(m, tuple(get_notrace_modules())) or super().is_leaf_module(m, name)


@pytest.mark.parametrize("kwargs", [{}, {"conv_shares": "q"}, {"mix": "attention"}, {"class_token": False}])
def test_fx_traces_the_network_with_gradients(kwargs):
    model = build(**kwargs).double()
    for tracer in (torch.fx.Tracer(), Timms()):
        graph = torch.fx.GraphModule(model, tracer.trace(model))
        for size in ((32, 32), (48, 40)):
            torch.testing.assert_close(graph(images(*size).double()), model(images(*size).double()))
        graph(images().double()).square().sum().backward()
