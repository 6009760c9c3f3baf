"""What can be timed: networks, blocks and single operations, built from the names a user gives."""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from acmix.config import load_config
from acmix.errors import UserError
from acmix.layers.attention import LocalAttention
from acmix.layers.block import ACmix
from acmix.layers.convolution import KINDS, ShiftConv
from acmix.models import create_model
from benchmarks.authors import Authors
from benchmarks.timing import use_threads

HEADS = 4
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PART = re.compile(
    r"(?P<kind>block|attention|shift_conv):(?P<channels>\d+)x(?P<size>\d+)(?:s(?P<stride>\d+))?(?::(?P<shift>\w+))?"
)


@dataclass(frozen=True)
class Setting:
    """How cases are run: device, autocast dtype, compilation, memory format, batch and image size, CPU threads."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: str = "float32"
    compile: bool = False
    channels_last: bool = False
    batch_size: int = 4
    image_size: int = 224
    threads: int = 1
    authors: Path | None = None

    def autocast(self) -> AbstractContextManager[object]:
        if self.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.dtype])


@dataclass
class Case:
    """A module with inputs, ready to be run.

    inputs: maps or images, (B, C, H, W) each; those of parts of a network require gradients, as they would inside one.
    classifies: whether the output is logits (a loss is taken) or a map (a fixed gradient is sent back).
    """

    label: str
    impl: str
    module: nn.Module
    inputs: tuple[Tensor, ...]
    classifies: bool
    setting: Setting

    def __post_init__(self) -> None:
        self._run: Callable[..., Tensor] = torch.compile(self.module) if self.setting.compile else self.module
        self._gradient: Tensor | None = None
        self._targets = torch.arange(len(self.inputs[0]), device=self.setting.device) % 10

    @property
    def batch_size(self) -> int:
        return len(self.inputs[0])

    @property
    def traffic(self) -> int:
        """Bytes of input, output and weights in the dtype of the run: what one pass must move at least."""
        with torch.no_grad():
            out = self.forward(self.inputs)
        numbers = sum(t.numel() for t in (*self.inputs, out, *self.module.parameters()))
        return numbers * DTYPES[self.setting.dtype].itemsize

    def forward(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """The module's output under the setting's autocast and compilation, on its threads."""
        use_threads(self.setting.threads)
        with self.setting.autocast():
            return self._run(*inputs)

    def train_step(self) -> None:
        """Forward, loss and backward; gradients start empty, as after `zero_grad(set_to_none=True)`."""
        self.clear()
        out = self.forward(self.inputs)
        if self.classifies:
            F.cross_entropy(out.float(), self._targets).backward()
            return
        if self._gradient is None:
            self._gradient = torch.ones_like(out)
        out.backward(self._gradient)

    @torch.no_grad()
    def infer(self) -> None:
        """Forward without gradients, in evaluation mode."""
        self.forward(self.inputs)

    def clear(self) -> None:
        """Drop all gradients."""
        for tensor in (*self.module.parameters(), *self.inputs):
            tensor.grad = None


def build_case(subject: str, setting: Setting, impl: str = "auto") -> Case:
    """Build what a user names, in training mode, with random weights and inputs from a fixed seed.

    Args:
        subject: a timm model (ours or another), the model of a config (`FILE.yaml`), `torchvision:NAME`,
            `authors:NAME`, or a part: `block:CHANNELSxSIZE`, `attention:...`, `shift_conv:...` or `authors:block:...`,
            with `sSTRIDE` behind the size if it strides, `:SHIFT` at the end for another shift than the learned one.
        impl: implementation of the ACmix operations, for subjects that have them.

    Raises UserError for a name that means nothing, or an implementation that the subject cannot take.
    """
    torch.manual_seed(0)
    where, _, name = subject.rpartition("authors:")
    if where:
        raise UserError(f"{subject}: authors: comes first")
    theirs = is_authors(subject)
    part = _PART.fullmatch(name)
    module = _authors_module(subject, name, part, setting) if theirs else _our_module(subject, part, setting, impl)
    module = module.to(setting.device)
    inputs = _inputs(part, setting)
    if setting.channels_last:
        module = module.to(memory_format=torch.channels_last)
        inputs = tuple(t.contiguous(memory_format=torch.channels_last) for t in inputs)
    inputs = tuple(t.requires_grad_(part is not None) for t in inputs)
    label = Path(subject).stem if _is_config(subject) else subject
    return Case(label, "" if theirs else impl, module, inputs, classifies=part is None, setting=setting)


def is_authors(subject: str) -> bool:
    """Whether the subject is the authors' code."""
    return subject.startswith("authors:")


def twin(subject: str) -> str:
    """Our subject of the same mathematics as one of the authors'."""
    name = subject.removeprefix("authors:")
    return name if _PART.fullmatch(name) else f"acmix_{name}"


def _authors_module(subject: str, name: str, part: re.Match[str] | None, setting: Setting) -> nn.Module:
    if setting.authors is None:
        raise UserError(f"{subject} needs --authors PATH, a clone of github.com/LeapLabTHU/ACmix")
    authors = Authors(setting.authors)
    if part is None:
        return authors.network(name)
    if part["kind"] != "block":
        raise UserError(f"{subject}: of their parts only authors:block:CHANNELSxSIZE can be built")
    return authors.block(int(part["channels"]), int(part["stride"] or 1))


def _our_module(subject: str, part: re.Match[str] | None, setting: Setting, impl: str) -> nn.Module:
    if part is None:
        return _configured(subject, setting, impl) if _is_config(subject) else _network(subject, impl)
    channels, stride, shift = int(part["channels"]), int(part["stride"] or 1), part["shift"] or "learned"
    if channels % HEADS:
        raise UserError(f"{subject}: {channels} channels do not divide into {HEADS} heads")
    if shift not in KINDS or (part["shift"] and part["kind"] == "attention"):
        raise UserError(f"{subject}: behind a block or shift_conv may stand a kind of shift: {', '.join(KINDS)}")
    if part["kind"] == "block":
        return ACmix(channels, channels, HEADS, stride=stride, shift=shift, impl=impl)
    if part["kind"] == "attention":
        return LocalAttention(HEADS, channels // HEADS, stride=stride, impl=impl)
    return ShiftConv(HEADS, channels // HEADS, stride=stride, kind=shift, impl=impl)


def _network(name: str, impl: str) -> nn.Module:
    source, _, bare = name.rpartition(":")
    if source == "torchvision" and bare in torchvision.models.list_models():
        return torchvision.models.get_model(bare)
    if source or not timm.is_model(name):
        raise UserError(
            f"{name}: neither a model of timm or torchvision: (torchvision:NAME), nor a part such as block:64x56"
        )
    kwargs: dict[str, Any] = {} if impl == "auto" else {"impl": impl}
    try:
        return timm.create_model(name, **kwargs)
    except TypeError as error:
        raise UserError(f"{name} takes no --impl {impl}: {error}") from None


def _is_config(subject: str) -> bool:
    return subject.endswith(".yaml")


def _configured(file: str, setting: Setting, impl: str) -> nn.Module:
    """The model of a config, for images of the setting's size."""
    model = load_config(file).model
    kwargs = model.kwargs | ({} if impl == "auto" else {"impl": impl})
    classes = 1000 if model.num_classes is None else model.num_classes
    return create_model(model.name, classes, image_size=(setting.image_size,) * 2, **kwargs)


def _inputs(part: re.Match[str] | None, setting: Setting) -> tuple[Tensor, ...]:
    if part is None:
        return (torch.randn(setting.batch_size, 3, setting.image_size, setting.image_size, device=setting.device),)
    # Inside a network the layer before a part gives it a map in the autocast dtype.
    shape = (setting.batch_size, int(part["channels"]), int(part["size"]), int(part["size"]))
    count = 1 if part["kind"] == "block" else 3
    return tuple(torch.randn(shape, device=setting.device, dtype=DTYPES[setting.dtype]) for _ in range(count))
