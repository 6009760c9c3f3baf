"""timm's conventions, which every network keeps, on small versions of the registered ones."""

import copy
from contextlib import nullcontext

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, jvp, vmap

from acmix import models
from acmix.layers import PathMix, ShiftConv
from acmix.layers.convolution import one_hot_shifts

RESNET = ("acmix_resnet26", {"base_width": 8, "stem": "cifar", "kernel_att": 3})
SWIN = ("acmix_swin_tiny", {"embed_dim": 8, "heads": (1, 2, 2, 4), "img_size": 32, "patch_size": 2, "window_size": 4})
PVT = ("acmix_pvt_tiny", {"embed_dims": (8, 8, 16, 16), "heads": (1, 1, 2, 2), "img_size": 32, "patch_size": 2})
SAN = ("acmix_san10", {"base_width": 16, "stem": "cifar", "kernel_att": (3, 3, 3, 3, 7), "layers": (1, 1, 1, 1, 1)})
SMALL = pytest.mark.parametrize(("name", "kwargs"), [RESNET, SWIN, PVT, SAN], ids=["resnet", "swin", "pvt", "san"])
FEWER = pytest.mark.parametrize(
    ("name", "kwargs"),
    [RESNET, SWIN, PVT, pytest.param(*SAN, marks=pytest.mark.slow)],  # dear for five stages
    ids=["resnet", "swin", "pvt", "san"],
)
SIZE = 32


def build(name: str, kwargs: dict, **more) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **{"num_classes": 5, **kwargs, **more})


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (2, 3, SIZE, SIZE)), generator=torch.Generator().manual_seed(1))


def learned_mixes(model: nn.Module) -> list[PathMix]:
    """All but the last of a PVT, whose last block has no convolution path."""
    return [module for module in model.modules() if isinstance(module, PathMix) and module.mode == "learned"]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # the authors' counts, less the bias of the position layer in each block of the ResNets: it cancels
        ("acmix_resnet26", 10_487_816 - 464),
        ("acmix_resnet38", 14_410_896 - 704),
        ("acmix_resnet50", 18_333_976 - 944),
        ("acmix_swin_tiny", 28_649_908),
        ("acmix_swin_small", 50_345_080),
    ],
)
def test_parameter_counts_are_the_authors(name, parameters):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@SMALL
def test_a_training_step_reaches_every_parameter(name, kwargs):
    model = build(name, kwargs, drop_path_rate=0.0).train()
    loss = nn.functional.cross_entropy(model(images()), torch.tensor([1, 3]))
    loss.backward()
    assert [key for key, parameter in model.named_parameters() if not parameter.grad.any()] == []


@SMALL
def test_initialisation_keeps_the_shifts_and_the_half_weights(name, kwargs):
    model = build(name, kwargs)
    convolutions = [module for module in model.modules() if isinstance(module, ShiftConv)]
    assert len(convolutions) == len(learned_mixes(model)) > 0
    for conv in convolutions:
        assert torch.equal(conv.shift_weight, one_hot_shifts(len(conv.shift_weight), 3))
    for mix in learned_mixes(model):
        assert (float(mix.alpha), float(mix.beta)) == (0.5, 0.5)


@SMALL
def test_path_weights_are_never_decayed(name, kwargs):
    model = build(name, kwargs)
    wanted = {key for key, _ in model.named_parameters() if key.endswith((".alpha", ".beta"))}
    assert wanted
    assert wanted <= model.no_weight_decay()
    groups = param_groups_weight_decay(model, weight_decay=0.1, no_weight_decay_list=model.no_weight_decay())
    decayed = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    assert not decayed & {id(parameter) for key, parameter in model.named_parameters() if key in wanted}


@SMALL
def test_stages_are_numbered_from_one_in_depth_order(name, kwargs):
    stages = [module.stage for module in build(name, kwargs).modules() if isinstance(module, PathMix)]
    assert stages == sorted(stages)
    assert set(stages) == set(range(1, 6 if name == SAN[0] else 5))


@SMALL
def test_features_head_and_logits_fit_together(name, kwargs):
    model = build(name, kwargs).eval()
    with torch.no_grad():
        features = model.forward_features(images())
        pooled = model.forward_head(features, pre_logits=True)
        torch.testing.assert_close(model.forward_head(features), model(images()))
    channels = features.shape[-1] if getattr(model, "output_fmt", "NCHW") == "NHWC" else features.shape[1]
    assert channels == model.num_features
    assert pooled.shape == (2, model.head_hidden_size)


@SMALL
def test_the_classifier_can_be_replaced_and_removed(name, kwargs):
    model = build(name, kwargs).eval()
    model.reset_classifier(3)
    assert model(images()).shape == (2, 3)
    assert model.get_classifier().out_features == model.num_classes == 3
    model.reset_classifier(0, "max")
    assert model(images()).shape == (2, model.num_features)
    assert isinstance(model.get_classifier(), nn.Identity)


@SMALL
def test_an_empty_batch_gives_no_logits_and_gradients_of_zero(name, kwargs):
    model = build(name, kwargs)
    logits = model(images()[:0])
    assert logits.shape == (0, model.num_classes)
    logits.sum().backward()
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


@SMALL
def test_features_only_gives_the_maps_that_feature_info_describes(name, kwargs):
    model = build(name, kwargs, features_only=True).eval()
    maps = model(images())
    assert len(maps) == len(model.feature_info.channels())
    assert model.feature_info.channels()[-1] == build(name, kwargs).num_features
    for map_, channels, reduction in zip(
        maps, model.feature_info.channels(), model.feature_info.reduction(), strict=True
    ):
        assert map_.shape == (2, channels, SIZE // reduction, SIZE // reduction)
    chosen = build(name, kwargs, features_only=True, out_indices=(1, 2)).eval()(images())
    torch.testing.assert_close(chosen, maps[1:3])


@SMALL
def test_intermediates_end_in_the_features_and_pruning_keeps_them(name, kwargs):
    model = build(name, kwargs).eval()
    with torch.no_grad():
        final, all_maps = model.forward_intermediates(images())
        torch.testing.assert_close(final, model.forward_features(images()))
        last_two = model.forward_intermediates(images(), indices=2, intermediates_only=True)
        torch.testing.assert_close(last_two, all_maps[-2:])
        early = model.forward_intermediates(images(), indices=[1], stop_early=True, intermediates_only=True)
        kept = model.prune_intermediate_layers([1])
        pruned = model.forward_intermediates(images(), indices=kept, intermediates_only=True)
    torch.testing.assert_close([early, pruned], [all_maps[1:2], all_maps[1:2]])
    assert model.num_features == all_maps[1].shape[1]
    assert isinstance(model.get_classifier(), nn.Identity)
    model.reset_classifier(3, "avg")
    assert model(images()).shape == (2, 3)


@SMALL
def test_gradient_checkpointing_changes_no_gradient(name, kwargs):
    gradients = []
    for checkpointing in (False, True):
        model = build(name, kwargs, drop_path_rate=0.0).double()
        model.set_grad_checkpointing(checkpointing)
        model(images().double()).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


@SMALL
def test_drop_path_drops_in_training_and_not_in_evaluation(name, kwargs):
    plain, dropping = build(name, kwargs, drop_path_rate=0.0), build(name, kwargs, drop_path_rate=0.9)
    dropping.load_state_dict(plain.state_dict())
    torch.testing.assert_close(dropping.eval()(images()), plain.eval()(images()))
    assert not torch.equal(dropping.train()(images()), dropping(images()))


@SMALL
def test_layer_decay_orders_the_parameters_from_stem_to_head(name, kwargs):
    model = build(name, kwargs)
    groups = param_groups_layer_decay(model, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay())
    scale = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    first, *_, last = model.parameters()
    mixes = learned_mixes(model)
    assert scale[id(first)] < scale[id(mixes[0].alpha)] < scale[id(mixes[-1].alpha)] < scale[id(last)]


@SMALL
def test_images_of_other_channels_and_odd_sizes_are_taken(name, kwargs):
    model = build(name, kwargs, in_chans=1).eval()
    assert model(images(1, 1, 45, 37)).shape == (1, 5)


@SMALL
@pytest.mark.parametrize("mix", ["attention", "convolution", "sum", "convex"])
def test_every_arm_trains_all_its_parameters(name, kwargs, mix):
    model = build(name, kwargs, mix=mix, drop_path_rate=0.0).train()
    model(images()).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@SMALL
def test_weights_load_with_plain_timm_and_copies_are_independent(name, kwargs):
    model = build(name, kwargs).eval()
    again = timm.create_model(name, **{"num_classes": 5, **kwargs}).eval()
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(images()), model(images()))
    copied = copy.deepcopy(model)
    with torch.no_grad():
        next(copied.parameters()).zero_()
    torch.testing.assert_close(again(images()), model(images()))


@FEWER
def test_a_network_of_meta_or_fake_tensors_runs_forward_and_backward(name, kwargs):
    for mode, device in ((nullcontext(), "meta"), (FakeTensorMode(), "cpu")):
        with mode, torch.device(device):
            model = build(name, kwargs)
            out = model(torch.empty(2, 3, SIZE, SIZE))
            out.sum().backward()
        assert out.shape == (2, 5)
        assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())


@SMALL
@pytest.mark.parametrize("shift", ["learned", "fixed"])
@pytest.mark.parametrize("assign", [False, True], ids=["to_empty", "assign"])
def test_a_network_built_on_the_meta_device_works_once_its_weights_are_loaded(name, kwargs, shift, assign):
    model = build(name, kwargs, shift=shift).eval()
    with torch.device("meta"):
        empty = build(name, kwargs, shift=shift).eval()
    if not assign:
        empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict(), assign=assign)
    torch.testing.assert_close(empty(images()), model(images()))


@FEWER
def test_a_traced_network_gives_the_same_logits(name, kwargs):
    model = build(name, kwargs).eval()
    traced = torch.jit.trace(model, images())
    for x in (images(), images(3, 3, SIZE, SIZE)):
        torch.testing.assert_close(traced(x), model(x))
    for size in ((48, 40), (2 * SIZE, 2 * SIZE), (SIZE + 1, SIZE)):
        x = images(2, 3, *size)
        if name in (RESNET[0], SAN[0]):
            torch.testing.assert_close(traced(x), model(x))
        else:
            with pytest.raises(RuntimeError, match=r"with_fixed_size[\s\S]*expanded size"):
                traced(x)


@SMALL
def test_gradients_of_every_image_equal_those_of_the_images_alone(name, kwargs):
    model = build(name, kwargs).double().eval()
    weights = {key: weight.detach() for key, weight in model.named_parameters()}

    def loss(weights, image):
        return functional_call(model, weights, (image[None],)).square().sum()

    together = vmap(grad(loss), in_dims=(None, 0))(weights, images().double())
    for index, image in enumerate(images().double()):
        model.zero_grad()
        model(image[None]).square().sum().backward()
        for key, weight in model.named_parameters():
            torch.testing.assert_close(together[key][index], weight.grad)


@SMALL
def test_a_gradient_penalty_and_a_directional_derivative_equal_those_of_the_reference(name, kwargs):
    results = []
    for impl in ("auto", "reference"):
        model = build(name, kwargs, impl=impl).double().eval()
        x = images(1, 3, SIZE, SIZE).double().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        slope.square().sum().backward()
        results.append([*(p.grad for p in model.parameters()), jvp(model, (x.detach(),), (torch.ones_like(x),))[1]])
    torch.testing.assert_close(*results)


@SMALL
def test_channels_last_images_give_the_same_logits(name, kwargs):
    model = build(name, kwargs).double().eval()
    x = images().double()
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(x.contiguous(memory_format=torch.channels_last)), model(x))


@SMALL
def test_autocast_trains_in_bfloat16(name, kwargs):
    model = build(name, kwargs).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nn.functional.cross_entropy(model(images()), torch.tensor([1, 3]))
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.slow
@SMALL
def test_a_network_is_one_graph_to_compile_and_to_export(name, kwargs):
    model = build(name, kwargs).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images()), model(images()))
    compiled(images()).sum().backward()
    exported = torch.export.export(model, (images(),)).module()
    torch.testing.assert_close(exported(images()), model(images()))


def test_default_configs_say_what_timm_needs():
    for name in timm.list_models("acmix_*"):
        cfg = timm.get_pretrained_cfg(name)
        assert (cfg.num_classes, cfg.input_size) == (1000, (3, 224, 224))
    model = models.create_model("acmix_resnet26", 5, **RESNET[1])
    assert model.get_submodule(model.default_cfg["classifier"]) is model.get_classifier()
    assert isinstance(model.get_submodule(model.default_cfg["first_conv"]), nn.Conv2d)
