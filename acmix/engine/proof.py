"""The model proved against the run's images before anything is created, and what a failed forward pass means."""

import inspect
import re
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from acmix.config import Config
from acmix.data.seeding import preserved_generators
from acmix.engine.forward import autocast, in_memory_format
from acmix.errors import UserError, one_line
from acmix.process.distributed import Distributed

_BATCH = 2
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|_STATUS_ALLOC_FAILED")
_INSTALLED = (str(Path(torch.__file__).parents[1]), str(Path(__file__).parents[1]))  # files that are not the user's


def prove(model: nn.Module, config: Config, classes: int, dist: Distributed, *, training: bool = False) -> None:
    """Pass two images of zeros through the model, as evaluation will, and check that logits come out.

    The model is moved to the device; its modes, its statistics and the random generators stay as they are. With
    `training` it also refuses a batch so small that batch norm would have a single value for each channel.

    Raises UserError with the model's own reason, the key that is most likely wrong and the way out.
    """
    images = torch.zeros(_BATCH, config.model.in_chans, *config.data.size, device=dist.device)
    images = in_memory_format(images, config.precision)
    model.to(dist.device)
    lonely: list[str] = []
    with ExitStack() as held:
        held.enter_context(_as_it_was(model, dist.device))
        if training and config.data.batch_size == 1 and not (config.precision.sync_bn and dist.world_size > 1):
            _note_single_values(model, lonely, held)
        with explained(model, config), torch.no_grad(), autocast(config.precision, dist.device):
            logits = model(images)
    _check_logits(logits, (_BATCH, classes), config.model.name)
    if lonely:
        raise UserError(
            f"data.batch_size: with one image of {_sizes(config)} the batch norm {lonely[0]} has a single value for "
            "each channel, of which there are no statistics; use at least 2, or raise data.image_size"
        )


@contextmanager
def explained(model: nn.Module, config: Config) -> Iterator[None]:
    """Turn the model's own error about the config's images, whatever it is, into a UserError with the way out."""
    try:
        yield
    except Exception as error:
        if _is_out_of_memory(error):
            raise
        raise UserError(_explain(error, model, config)) from error


@contextmanager
def memory_explained(config: Config) -> Iterator[None]:
    """Turn torch's error for lack of memory into a UserError that names data.batch_size."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        raise UserError(
            f"data.batch_size: {config.data.batch_size} images of {_sizes(config)} and {config.model.name} do not fit "
            f"in memory ({one_line(error, 120)}); lower data.batch_size (in validation data.val_batch_size) and raise "
            "optimizer.accumulate to keep the update, or set precision.amp=bf16 or precision.grad_checkpointing=true"
        ) from error


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or bool(_NO_MEMORY.search(str(error)))


@contextmanager
def _as_it_was(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode inside; afterwards each module's mode and the random generators are as before."""
    modes = {module: module.training for module in model.modules()}
    with preserved_generators(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def _note_single_values(model: nn.Module, found: list[str], held: ExitStack) -> None:
    """While `held` is open, add the name of each batch norm that gets one value of each image and channel."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):

            def note(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                if inputs and inputs[0][0, 0].numel() == 1:
                    found.append(name)

            held.callback(module.register_forward_pre_hook(note).remove)


def _check_logits(logits: Any, shape: tuple[int, int], name: str) -> None:
    wanted = f"where logits of shape (batch, classes), here {shape}, are needed"
    if not isinstance(logits, Tensor):
        raise UserError(f"model.name: {name} gives a {type(logits).__name__} {wanted}; choose another model or kwargs")
    if logits.dim() == 2 and logits.shape[0] == shape[0] and logits.shape != shape:
        raise UserError(
            f"model.name: {name} gives {logits.shape[1]} numbers for each image {wanted}; its classifier must have as "
            "many outputs as its argument num_classes says"
        )
    if logits.shape != shape:
        raise UserError(
            f"model.name: {name} gives {tuple(logits.shape)} {wanted}; it has to pool its features and classify them "
            "(model.kwargs.global_pool, where it takes one)"
        )


def _explain(error: Exception, model: nn.Module, config: Config) -> str:
    reason = one_line(error)
    key, way_out = _way_out(reason, model, config)
    if not isinstance(error, (RuntimeError, ValueError, AssertionError)):
        reason = f"{type(error).__name__}: {reason}"
    channels = config.model.in_chans
    images = f"images of {_sizes(config)} with {channels} channel{'s' * (channels > 1)}"
    return f"{key}: {config.model.name} cannot take {images}: {reason}{_place(error)}; {way_out}"


def _way_out(reason: str, model: nn.Module, config: Config) -> tuple[str, str]:
    """The key that is most likely wrong, and what to do."""
    kwargs, size = config.model.kwargs, list(config.data.size)
    arguments = inspect.signature(type(model)).parameters
    cfg = getattr(model, "pretrained_cfg", None) or {}
    if (channels := re.search(r"to have (1|3) channels, but got", reason)) is not None:
        return "model.kwargs.in_chans", f"set model.kwargs.in_chans={channels[1]}, and the images are read so"
    if "not implemented for" in reason and config.precision.amp != "none":
        return "precision.amp", "set precision.amp=none, or use a device that can compute in this type"
    built = (
        list(cfg.get("input_size", ())[1:]) if kwargs.get("img_size") is None else list(to_2tuple(kwargs["img_size"]))
    )
    if built and built != size and (cfg.get("fixed_input_size") or "match" in reason):
        if "img_size" not in arguments:
            return "data.image_size", f"set data.image_size={_plain(built)}, the size it was built for"
        way_out = (
            f"set model.kwargs.img_size={_plain(size)}, or data.image_size={_plain(built)}, for which it was built"
        )
        return "model.kwargs.img_size", way_out
    if "global_pool" in kwargs and not kwargs["global_pool"]:
        return "model.kwargs.global_pool", "leave it out: a classifier needs pooled features"
    return "data.image_size", "raise data.image_size, or change what model.kwargs say of sizes"


def _place(error: Exception) -> str:
    """Where in the user's own files the error arose; nothing for a model of timm's or ours."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_INSTALLED)]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


def _plain(size: list[int]) -> str:
    return str(size[0]) if size[0] == size[1] else str(size).replace(" ", "")


def _sizes(config: Config) -> str:
    height, width = config.data.size
    return f"{height} × {width} pixels"
