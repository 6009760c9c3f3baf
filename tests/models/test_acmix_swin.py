"""What is particular to ACmix-Swin: windows, paddings, sizes."""

import pytest
import timm
import torch

from acmix.models import swin_blocks

SMALL = {"num_classes": 5, "embed_dim": 8, "heads": (1, 2, 2, 4), "patch_size": 2}


def windows(model: torch.nn.Module) -> list[tuple]:
    """Window and shift of the second block in each stage."""
    return [(stage.blocks[1].acmix.attention.window_size, stage.blocks[1].shift_size) for stage in model.layers]


def test_a_map_no_larger_than_the_window_is_one_window_without_a_shift():
    model = timm.create_model("acmix_swin_tiny", img_size=(32, 48), window_size=7, **SMALL)
    assert windows(model) == [((7, 7), (3, 3)), ((7, 7), (3, 3)), ((4, 6), (0, 0)), ((2, 3), (0, 0))]


@pytest.mark.parametrize("window_size", [4, (4, 6)])
def test_window_size_may_be_given(window_size):
    model = timm.create_model("acmix_swin_tiny", img_size=64, window_size=window_size, **SMALL)
    assert windows(model)[0] == (((4, 4), (2, 2)) if window_size == 4 else ((4, 6), (2, 3)))


@pytest.mark.parametrize("size", [(32, 32), (40, 56), (31, 45), (6, 9)])
def test_images_of_any_size_are_taken_at_the_call(size):
    model = timm.create_model("acmix_swin_tiny", img_size=32, window_size=4, **SMALL).eval()
    assert model(torch.randn(2, 3, *size)).shape == (2, 5)


def test_a_network_built_for_a_size_gives_the_same_as_one_that_meets_it_at_the_call():
    torch.manual_seed(0)
    built, meeting = (
        timm.create_model("acmix_swin_tiny", img_size=size, window_size=2, **SMALL).double().eval() for size in (72, 64)
    )
    meeting.load_state_dict(built.state_dict())
    x = torch.randn(1, 3, 72, 72, dtype=torch.float64)
    torch.testing.assert_close(meeting(x), built(x))


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # in timm
def test_set_input_size_makes_the_windows_and_position_biases_of_timm():
    ours = timm.create_model("acmix_swin_tiny", embed_dim=24, num_classes=5)
    theirs = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=24, num_classes=5)

    def tables(model):
        return [table for name, table in model.named_parameters() if name.endswith("bias_table")]

    with torch.no_grad():
        for own, other in zip(tables(ours), tables(theirs), strict=True):
            own.copy_(other)
    for sizes in ({"img_size": (288, 256)}, {"window_size": (4, 6)}, {"img_size": (96, 160), "window_size": 8}):
        for model in (ours, theirs):
            model.set_input_size(**sizes)
        torch.testing.assert_close(tables(ours), tables(theirs))
        assert windows(ours) == [(stage.blocks[1].window_size, stage.blocks[1].shift_size) for stage in theirs.layers]


def test_a_network_set_to_a_size_is_one_built_for_it():
    torch.manual_seed(0)
    model = timm.create_model("acmix_swin_tiny", img_size=32, window_size=4, **SMALL).double().eval()
    state, x = torch.get_rng_state(), torch.randn(1, 3, 64, 48, dtype=torch.float64)
    model.set_input_size(img_size=(64, 48), window_size=6)
    built = timm.create_model("acmix_swin_tiny", img_size=(64, 48), window_size=6, **SMALL).double().eval()
    built.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(x), built(x))
    assert windows(model) == windows(built)
    torch.set_rng_state(state)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.set_input_size(img_size=(64, 48))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="img_size must be at least 1"):
        model.set_input_size(img_size=0)


@pytest.mark.parametrize(("ratio", "partition"), [(8, None), (4, True)])
def test_windows_may_follow_from_a_ratio_and_cut_small_maps_too(ratio, partition):
    ours = timm.create_model("acmix_swin_tiny", img_size=64, window_size=4, **SMALL)
    ours.set_input_size(patch_size=4, window_ratio=ratio, always_partition=partition)
    side = 16 // ratio
    whole = (side, side), (side // 2, side // 2)
    assert windows(ours)[:2] == [whole, whole]
    assert windows(ours)[3] == (whole if partition else ((2, 2), (0, 0)))
    assert [info["reduction"] for info in ours.feature_info] == [4, 8, 16, 32]
    assert ours.eval()(torch.randn(2, 3, 64, 64)).shape == (2, 5)


def test_the_shift_is_undone_and_moves_nothing_but_the_windows():
    torch.manual_seed(0)
    model = timm.create_model("acmix_swin_tiny", img_size=32, window_size=4, mix="convolution", **SMALL)
    model = model.double().eval()
    x = torch.zeros(1, 16, 16, 8, dtype=torch.float64)
    x[0, 8, 8] = torch.randn(8)
    shifted = model.layers[0].blocks[1](x)
    plain = model.layers[0].blocks[0]
    plain.load_state_dict(model.layers[0].blocks[1].state_dict())
    inner = slice(3, 13)  # away from the seam, a convolution does not see the shift
    torch.testing.assert_close(shifted[:, inner, inner], plain(x)[:, inner, inner])


@pytest.mark.parametrize("hooked", [False, True])
def test_the_perceptron_takes_parts_in_inference_unless_a_hook_wants_to_see_it_whole(monkeypatch, hooked):
    monkeypatch.setattr(swin_blocks, "HIDDEN_VALUES", 32 * 9)  # nine pixels of the first stage, which 16 × 16 exceeds
    model = timm.create_model("acmix_swin_tiny", img_size=32, window_size=4, **SMALL).double().eval()
    block, x = model.layers[0].blocks[0], torch.randn(2, 16, 16, 8, dtype=torch.float64)
    want, called = block(x.requires_grad_()), []
    if hooked:
        block.mlp.act.register_forward_hook(lambda module, inputs, out: called.append(len(out)))
    with torch.no_grad():
        assert block._rows_in_part(x) == (0 if hooked else 9)
        torch.testing.assert_close(block(x), want)
    assert called == ([2] if hooked else [])


@pytest.mark.parametrize("place", ["mlp.act", "norm2"])
def test_a_layer_put_into_the_perceptron_sees_the_whole_map_in_inference_too(monkeypatch, place):
    class Centred(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - x.mean((1, 2), keepdim=True)

    monkeypatch.setattr(swin_blocks, "HIDDEN_VALUES", 32 * 9)
    model = timm.create_model("acmix_swin_tiny", img_size=32, window_size=4, **SMALL).eval()
    block, x = model.layers[0].blocks[0], torch.randn(2, 16, 16, 8)
    block.set_submodule(place, Centred())
    with torch.no_grad():
        inferred = block(x)
    torch.testing.assert_close(inferred, block(x))


def test_a_compiled_network_has_no_convolution_of_pytorch_but_the_first():
    """For one, Inductor would take the maps before it for (B, C, H, W), and lay them out as (B, W, C, H)."""
    targets = []

    def keep(graph: torch.fx.GraphModule, _: list[torch.Tensor]):
        targets.extend(node.target for node in graph.graph.nodes)
        return graph

    few_and_many = {**SMALL, "depths": (1, 1), "heads": (2, 16)}
    model = timm.create_model("acmix_swin_tiny", img_size=16, window_size=4, **few_and_many).eval()
    x = torch.randn(2, 3, 16, 16)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(model, backend=keep, fullgraph=True)(x), model(x))
    assert [getattr(target, "__name__", None) for target in targets].count("conv2d") == 1
