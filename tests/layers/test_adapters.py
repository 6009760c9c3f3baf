"""What users put on and around the parts of a block: adapters, wrappers, parametrizations, quantized layers, hooks."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations

from acmix import ACmix, models
from acmix.layers import WindowAttention

N, D = 2, 4
CHANNELS = N * D
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def local_block(**options) -> ACmix:
    return ACmix(CHANNELS, CHANNELS, N, kernel_att=3, **options)


def window_block(**options) -> ACmix:
    """On maps of 12 × 9: windows that do not tile the map, with a shift."""
    attention = WindowAttention(N, D, (4, 4), (2, 2), (12, 9))
    return ACmix(CHANNELS, CHANNELS, N, attention=attention, conv_bias=True, **options)


def resnet() -> nn.Module:
    return models.create_model("acmix_resnet26", 10, stem="cifar", base_width=16)


def swin() -> nn.Module:
    small = {"embed_dim": 8, "heads": (1, 2, 2, 4), "img_size": 32, "patch_size": 2, "window_size": 4}
    return models.create_model("acmix_swin_tiny", 10, **small)


BLOCKS = pytest.mark.parametrize("build", [local_block, window_block])
PARTS = pytest.mark.parametrize(
    ("build", "name"),
    [
        *(
            (build, name)
            for build in (local_block, window_block)
            for name in ("qkv", "attention", "convolution", "mix")
        ),
        (window_block, "attention.proj"),
    ],
)
MODELS = pytest.mark.parametrize("build", [local_block, window_block, resnet, swin])


def built(build, **options) -> nn.Module:
    torch.manual_seed(0)
    return build(**options).double().eval()


def images(module: nn.Module) -> Tensor:
    shape = (2, CHANNELS, 12, 9) if isinstance(module, ACmix) else (1, 3, 32, 32)
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)


def blocks_of(module: nn.Module) -> list[ACmix]:
    return [block for block in module.modules() if isinstance(block, ACmix)]


class LoRA(nn.Module):
    """A low-rank adapter around a linear layer that it hides: it has no `weight` of its own."""

    def __init__(self, base_layer: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base_layer
        like = {"dtype": base_layer.weight.dtype}
        self.down = nn.Parameter(torch.randn(rank, base_layer.in_features, **like))
        self.up = nn.Parameter(torch.zeros(base_layer.out_features, rank, **like))

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.down.T @ self.up.T


def adapt(module: nn.Module) -> list[LoRA]:
    """Put an adapter around every linear layer of every block."""
    adapters = []
    for block in blocks_of(module):
        linears = [name for name, part in block.named_modules() if type(part) is nn.Linear]
        for name in linears:
            adapters.append(LoRA(block.get_submodule(name)))
            block.set_submodule(name, adapters[-1])
    return adapters


@MODELS
def test_an_adapter_changes_nothing_at_its_start_and_then_trains(build):
    module = built(build)
    x = images(module)
    want = module(x)
    adapters = adapt(module)
    assert len(adapters) == len(blocks_of(module)) * (1 if build in (local_block, resnet) else 2)
    torch.testing.assert_close(module(x), want, **EXACT)
    for adapter in adapters:
        nn.init.normal_(adapter.up)
    out = module(x)
    assert not torch.allclose(out, want)
    out.square().sum().backward()
    tensors = [tensor for adapter in adapters for tensor in adapter.parameters()]
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in tensors)


@BLOCKS
@pytest.mark.parametrize("mix", ["attention", "convolution", "convex"])
def test_an_adapter_works_in_every_arm_that_has_its_layer(build, mix):
    module = built(build, mix=mix)
    x = images(module)
    want = module(x)
    adapt(module)
    torch.testing.assert_close(module(x), want, **EXACT)


@BLOCKS
def test_weight_norm_leaves_the_block_as_it_is_and_spectral_norm_rescales_it(build):
    module = built(build)
    x = images(module)
    want = module(x)
    layers = [part for part in module.modules() if type(part) is nn.Linear]
    for layer in layers:
        parametrizations.weight_norm(layer)
    torch.testing.assert_close(module(x), want, **EXACT)
    module(x).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())

    plain, normed = built(build), built(build)
    for name, layer in [(name, part) for name, part in normed.named_modules() if type(part) is nn.Linear]:
        parametrizations.spectral_norm(layer).eval()
        with torch.no_grad():
            plain.get_submodule(name).weight.copy_(layer.weight)
    torch.testing.assert_close(normed(x), plain(x), **EXACT)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@MODELS
def test_dynamic_quantization_runs_and_differs_by_about_its_eight_bits(build):
    if not [engine for engine in torch.backends.quantized.supported_engines if engine != "none"]:
        pytest.skip("this build of PyTorch has no quantized engine")
    module = built(build).float()
    x = images(module).detach().float()
    want = module(x)
    quantized = torch.ao.quantization.quantize_dynamic(module, {nn.Linear})
    assert not [part for part in quantized.modules() if type(part) is nn.Linear]
    out = quantized(x)
    assert not torch.equal(out, want)
    assert float((out - want).detach().norm() / want.detach().norm()) < 0.05


class Int8Weight(Tensor):
    """A weight in eight bits that, as those of torchao, can do nothing but multiply in a linear layer."""

    @staticmethod
    def __new__(cls, codes: Tensor, step: Tensor) -> Tensor:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=step.dtype)

    def __init__(self, codes: Tensor, step: Tensor) -> None:
        self.codes, self.step = codes, step

    def __tensor_flatten__(self):
        return ["codes", "step"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["codes"], inner["step"])

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            x, weight, bias = args
            return nn.functional.linear(x, weight.codes * weight.step, bias)
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(function)


@BLOCKS
def test_a_linear_layer_whose_weight_is_no_ordinary_tensor_is_called(build):
    module, plain = built(build), built(build)
    for name, layer in [(name, part) for name, part in module.named_modules() if type(part) is nn.Linear]:
        step = layer.weight.detach().abs().max() / 127
        codes = (layer.weight.detach() / step).round().to(torch.int8)
        layer._parameters["weight"] = Int8Weight(codes, step)
        plain.get_submodule(name).weight.data.copy_(codes * step)
    torch.testing.assert_close(module(images(module)), plain(images(plain)), **EXACT)


def parts_of(block: ACmix) -> dict[str, nn.Module]:
    names = ["qkv", "mix", "attention", "convolution"] + (["attention.proj"] if block.attention.proj else [])
    return {name: block.get_submodule(name) for name in names}


@PARTS
def test_hooks_of_every_kind_fire_once_a_call_and_change_no_number(build, name):
    hold_hooks(build, {name})


@BLOCKS
def test_hooks_on_all_parts_at_once_fire_once_a_call_and_change_no_number(build):
    hold_hooks(build, set(parts_of(built(build))))


def hold_hooks(build, names: set[str]) -> None:
    """Hook the parts of these names in every way, and compare with the block without hooks."""
    module = built(build)
    want = module(images(module))
    want.square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    fired = []
    parts = {name: part for name, part in parts_of(module).items() if name in names}
    for name, part in parts.items():
        part.register_forward_pre_hook(lambda *_, name=name: fired.append((name, "before")))
        part.register_forward_hook(lambda *_, name=name: fired.append((name, "after")))
        part.register_full_backward_pre_hook(lambda *_, name=name: fired.append((name, "before backward")))
        part.register_full_backward_hook(lambda *_, name=name: fired.append((name, "backward")))
    out = module(images(module))
    out.square().sum().backward()
    kinds = ("before", "after", "before backward", "backward")
    assert sorted(fired) == sorted((name, kind) for name in parts for kind in kinds)
    torch.testing.assert_close(out, want, **EXACT)
    torch.testing.assert_close([parameter.grad for parameter in module.parameters()], gradients, **EXACT)


@BLOCKS
def test_the_mix_sees_both_paths_and_gives_their_weighted_sum(build):
    module = built(build)
    module.mix.alpha.data.fill_(0.3)
    module.mix.beta.data.fill_(1.7)
    seen = {}
    for name, part in parts_of(module).items():
        part.register_forward_hook(lambda _, inputs, out, name=name: seen.update({name: (inputs, out)}))
    out = module(images(module))
    (attention, convolution), mixed = seen["mix"]
    assert torch.equal(mixed, out)
    assert torch.equal(convolution, seen["convolution"][1])
    assert torch.equal(attention, seen["attention"][1][..., :12, :9])
    torch.testing.assert_close(mixed, 0.3 * attention + 1.7 * convolution, **EXACT)
    if module.attention.proj is not None:
        torch.testing.assert_close(seen["attention.proj"][1].permute(0, 3, 1, 2), seen["attention"][1], **EXACT)


@BLOCKS
@pytest.mark.parametrize("mix", ["attention", "convolution"])
def test_a_hooked_mix_gets_none_for_the_path_that_its_mode_leaves_out(build, mix):
    module = built(build, mix=mix)
    want = module(images(module))
    seen = []
    module.mix.register_forward_pre_hook(lambda _, inputs: seen.append([path is None for path in inputs]))
    torch.testing.assert_close(module(images(module)), want, **EXACT)
    assert seen == [[mix == "convolution", mix == "attention"]]


@MODELS
def test_a_hook_that_silences_a_path_leaves_the_other(build):
    module, lone = built(build), built(build)
    for block in blocks_of(module):
        block.attention.register_forward_hook(lambda _, inputs, out: torch.zeros_like(out))
    for block in blocks_of(lone):
        block.mix.alpha.data.zero_()
    torch.testing.assert_close(module(images(module)), lone(images(lone)), **EXACT)


def grad_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    """Positive part of the channels' sum, each channel weighted by its mean gradient: (B, H, W)."""
    return (activation * gradient.mean((2, 3), keepdim=True)).sum(1).relu()


def as_map(out: Tensor, name: str) -> Tensor:
    return out.permute(0, 3, 1, 2) if name in ("qkv", "attention.proj") else out


@PARTS
def test_grad_cam_by_hooks_equals_the_one_by_hand(build, name):
    module = built(build)
    x = images(module).detach()

    # by hand, with the block's parts on maps that we hold
    padded = module.attention.pad(x)
    maps = {"qkv": nn.functional.conv2d(padded, module.qkv.weight[:, :, None, None], module.qkv.bias)}
    q, k, v = maps["qkv"].chunk(3, 1)
    maps["attention"] = module.attention(q, k, v)
    maps["attention.proj"] = maps["attention"][..., :12, :9]  # padding is not projected
    maps["convolution"] = module.convolution(*(m[..., :12, :9] for m in (q, k, v)))
    alpha, beta = module.mix.weights()
    maps["mix"] = alpha * maps["attention.proj"] + beta * maps["convolution"]
    (gradient,) = torch.autograd.grad(maps["mix"].square().sum(), maps[name])
    want = grad_cam(maps[name], gradient)

    held = {}
    part = module.get_submodule(name)
    part.register_forward_hook(lambda _, inputs, out: held.update(activation=as_map(out, name)))
    part.register_full_backward_hook(lambda _, inputs, outputs: held.update(gradient=as_map(outputs[0], name)))
    module(x.requires_grad_()).square().sum().backward()
    torch.testing.assert_close(grad_cam(held["activation"], held["gradient"]), want, **EXACT)


@BLOCKS
def test_a_hook_on_all_modules_sees_every_part(build):
    module = built(build)
    want = module(images(module))
    called = []
    handle = nn.modules.module.register_module_forward_hook(lambda part, *_: called.append(part))
    try:
        out = module(images(module))
    finally:
        handle.remove()
    torch.testing.assert_close(out, want, **EXACT)
    assert set(parts_of(module).values()) <= set(called)
    assert len(called) == len(set(called))


@BLOCKS
def test_a_forward_set_on_the_instance_runs(build):
    module = built(build)
    want = module(images(module))
    called = []
    for name, part in parts_of(module).items():
        own = part.forward

        def forward(*inputs: Tensor, name: str = name, own=own) -> Tensor:
            called.append(name)
            return own(*inputs)

        part.forward = forward
    torch.testing.assert_close(module(images(module)), want, **EXACT)
    assert sorted(called) == sorted(parts_of(module))


class Wrapper(nn.Module):
    """Hides a module: nothing of it can be reached but its call."""

    def __init__(self, hidden: nn.Module) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.hidden(*inputs)


def test_a_wrapped_path_is_called():
    module = built(local_block)
    for name in ("attention", "convolution"):
        wrapped = copy.deepcopy(module)
        setattr(wrapped, name, Wrapper(getattr(wrapped, name)))
        torch.testing.assert_close(wrapped(images(module)), module(images(module)), **EXACT)


@BLOCKS
@torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)  # PyTorch 2.11 leaves such guards out
def test_a_hook_reaches_a_compiled_an_exported_a_traced_and_a_copied_block(build):
    def double(part: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return 2 * out

    module = built(build)
    x = images(module).detach()
    torch.compiler.reset()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x), **EXACT)
    handle = module.attention.register_forward_hook(double)
    want = module(x)
    torch.testing.assert_close(compiled(x), want, **EXACT)
    torch.testing.assert_close(copy.deepcopy(module)(x), want, **EXACT)
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), want, **EXACT)
    torch.testing.assert_close(make_fx(module)(x)(x), want, **EXACT)
    handle.remove()
    torch.testing.assert_close(compiled(x), module(x), **EXACT)
    assert not torch.allclose(module(x), want)
