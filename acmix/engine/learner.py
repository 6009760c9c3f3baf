"""A model and all that changes its weights: loss, gradients, optimizer, schedule, loss scaling, running average."""

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import convert_sync_batchnorm
from timm.models import model_parameters
from timm.utils import ModelEmaV3
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from acmix.checkpoint.fit import load_fitting
from acmix.config import Config
from acmix.data.seeding import seed_generators, stream_seed
from acmix.engine.forward import Mixing, autocast, network_inputs
from acmix.engine.inductor import keep_stores_inside
from acmix.engine.loss import Loss, class_weights
from acmix.engine.on_host import OnHost
from acmix.engine.optim import build_optimizer, build_scheduler, load_optimizer, parameter_groups, refuse_rates
from acmix.errors import UserError
from acmix.layers.mix import path_weights
from acmix.ops.native import cxx_compiler
from acmix.process.distributed import Distributed

if TYPE_CHECKING:
    from acmix.data.loader import Batch, TrainLoader

_TINY = torch.finfo(torch.float32).tiny


class Learner:
    """Wraps a model for training on this process.

    Args:
        config: the run's config.
        model: the bare network, with the same weights on every rank.
        dist: this process among the others.
        loader: the training loader, for the images per step and the steps per epoch.
        mixing: mixup and cutmix, images and targets → mixed images and soft targets; None for none.
        new: names of the parameters that `optimizer.new_lr_factor` is for.

    Attributes: `model` the bare network (never wrapped, so its state dict has plain names), `ema` timm's average or
    None, `optimizer`, `scheduler`, `scaler`, `path_gradients` the gradients of alpha and beta, by name, in the last
    update if that was measured.

    Raises UserError for class weights of other classes, SyncBN without CUDA, an optimizer or schedule that cannot be
    built, and gradient checkpointing that the model does not support.
    """

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        dist: Distributed,
        loader: "TrainLoader",
        *,
        mixing: Mixing | None = None,
        new: Sequence[str] = (),
    ) -> None:
        self.config = config
        self.new = new
        self.dist = dist
        self.mixing = mixing
        self.model = _prepare(model, config, dist)
        self.ema = None
        self.ema_updates = 0
        self.path_gradients: dict[str, Tensor] = {}
        if config.ema.decay is not None:
            self.ema = ModelEmaV3(self.model, decay=config.ema.decay, use_warmup=config.ema.warmup)
        refuse_rates(config.optimizer, config.schedule, loader.global_batch)
        self.optimizer = build_optimizer(self.model, config.optimizer, loader.global_batch, new)
        self.scheduler = build_scheduler(self.optimizer, config.schedule, loader.updates_per_epoch)
        self.scaler = torch.amp.GradScaler(dist.device.type, enabled=config.precision.amp == "fp16")
        self._paths = path_weights(self.model)
        self._frozen_steps = round(config.optimizer.path_freeze_epochs * loader.updates_per_epoch)
        weights = class_weights(config, loader)
        self._loss = Loss(config, None if weights is None else weights.to(dist.device), mixed=mixing is not None)
        self._runner: nn.Module = self.model
        if dist.world_size > 1:
            self._runner = _wrap(self.model, dist)
        if config.precision.compile:
            _prepare_compiler(dist.device)
            self._runner.compile()  # in place: no wrapper, no `_orig_mod.` in the state dict

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def averaged(self) -> nn.Module:
        """The network to evaluate: the running average where there is one and `run.eval_ema`, else the raw one."""
        return self.ema.module if self.ema is not None and self.config.run.eval_ema else self.model

    @property
    def lr(self) -> float:
        """Learning rate of the last step, before the factors of layers and path weights."""
        group = self.optimizer.param_groups[0]
        return float(group["lr"]) / float(group.get("lr_scale", 1.0))

    def gradients(self, batches: Sequence["Batch"], step: int) -> list[OnHost]:
        """Accumulate the gradients of a step (counted from 1); returns the loss of each micro-batch, float64.

        On a GPU it returns when the work is queued, and the losses can be read before the last backward pass is done.
        All that is random (mixup, drop path, dropout) is seeded from (seed, step, rank, micro-batch) alone.
        """
        losses = []
        weight = self._mean_weight(batches)
        for micro, batch in enumerate(batches):
            self.dist.watchdog.tick(step, "forward pass")
            with self._synchronise(micro == len(batches) - 1):
                loss = self.loss(batch, step, micro, weight)
                losses.append(OnHost(loss.double()))
                self.dist.watchdog.tick(step, "backward pass")
                self.scaler.scale(loss / len(batches)).backward()
        return losses

    def loss(self, batch: "Batch", step: int, micro: int = 0, weight: Tensor | None = None) -> Tensor:
        """The loss of one micro-batch of a step, a scalar to differentiate.

        `weight`: with class weights, the mean over ranks and micro-batches of what their images weigh together, by
        which the mean of their losses is that of the whole step; None: what the images of this one weigh.
        """
        seed_step(self.config.run.seed, step, self.dist.rank, micro)
        images, targets = network_inputs(batch, self.config.precision, self.dist.device, self.mixing)
        with autocast(self.config.precision, self.dist.device):
            logits = self._runner(images)
            if not isinstance(logits, Tensor):  # evaluation has seen one, but some networks train with several outputs
                raise UserError(
                    f"model.name: {self.config.model.name} gives a {type(logits).__name__} in training, where one "
                    "tensor of logits is needed; choose another model or model.kwargs"
                )
            losses = self._loss(logits, targets)
        weights = self._loss.weights(targets)
        if weights is None and not batch.errors:
            return losses.mean()
        valid = batch.valid.to(losses)  # 0 where another image stands in for one that cannot be read
        if weights is None:
            return (losses * valid).sum() / valid.sum().clamp(min=1)
        return (losses * valid).sum() / ((weights * valid).sum() if weight is None else weight).clamp(min=_TINY)

    def update(self, step: int, *, measure: bool = False) -> Tensor | None:
        """Take a step (counted from 1) with the accumulated gradients; returns their norm before clipping.

        The norm is None unless clipping is on or `measure` asks for it.
        """
        self.scheduler.step_update(step - 1)
        if step <= self._frozen_steps:
            for weight in self._paths.values():
                weight.grad = None  # the optimizer passes over it and begins its averages with the first gradient
        self.path_gradients = {}
        norm = None
        clip, mode = self.config.optimizer.clip_grad, self.config.optimizer.clip_mode
        if clip is not None or measure:
            self.scaler.unscale_(self.optimizer)
            if measure:
                self.path_gradients = {name: w.grad.clone() for name, w in self._paths.items() if w.grad is not None}
            norm = self._clip(clip, mode)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.discard()
        if self.ema is not None:
            self.ema_updates += 1
            self.ema.update(self.model, step=self.ema_updates)
        return norm

    def discard(self) -> None:
        """Drop the accumulated gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def share_buffers(self) -> None:
        """Give every rank rank 0's buffers, in the network and its average."""
        self.dist.share_buffers(self.model)
        if self.ema is not None:
            self.dist.share_buffers(self.ema.module)

    def training_state(self) -> dict[str, Any]:
        """What a resumed run needs besides the weights: tensors and plain containers only."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema_updates": self.ema_updates,
        }

    def load(self, model: dict[str, Tensor], ema: dict[str, Tensor] | None, training: dict[str, Any]) -> None:
        """Restore a checkpoint's state; the schedule has none. Hyperparameters stay as the config says now.

        Raises UserError when the checkpoint does not fit the network or the optimizer.
        """
        try:
            load_fitting(self.model, model)
            if self.ema is not None:
                load_fitting(self.ema.module, model if ema is None else ema)
            groups = parameter_groups(self.model, self.config.optimizer, self.new)
            load_optimizer(self.optimizer, self.config.optimizer, training["optimizer"], groups)
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(f"the checkpoint does not fit this model or optimizer: {error}") from None
        if training["scaler"]:
            self.scaler.load_state_dict(training["scaler"])
        self.ema_updates = 0 if ema is None else training["ema_updates"]

    def _synchronise(self, last: bool) -> Any:
        """Ranks exchange gradients with the last micro-batch of a step only."""
        if last or not isinstance(self._runner, DistributedDataParallel):
            return nullcontext()
        return self._runner.no_sync()

    def _mean_weight(self, batches: Sequence["Batch"]) -> Tensor | None:
        """What `loss` takes as `weight`: the same on all ranks."""
        if self.mixing is not None or not self._loss.weighted:
            return None
        totals = []
        for batch in batches:
            weights = self._loss.weights(batch.targets.to(self.dist.device))
            assert weights is not None
            totals.append((weights * batch.valid.to(weights)).sum())
        total = torch.stack(totals).mean()
        if self.dist.world_size > 1:
            total = (self.dist.all_reduce(total.cpu()) / self.dist.world_size).to(total)
        return total

    def _clip(self, clip: float | None, mode: str) -> Tensor:
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients, foreach=None)
        if clip is not None and mode == "norm":
            nn.utils.clip_grads_with_norm_(self.model.parameters(), clip, norm)
        elif clip is not None and mode == "value":
            nn.utils.clip_grad_value_(self.model.parameters(), clip)
        elif clip is not None:
            adaptive_clip_grad(model_parameters(self.model, exclude_head=True), clip)
        return norm


def seed_step(seed: int, step: int, rank: int, micro: int) -> None:
    """Seed torch, numpy and Python for one micro-batch of one step on one rank."""
    value = stream_seed("step", seed, step, rank, micro)
    seed_generators(value)
    if torch.cuda.is_available():
        torch.cuda.manual_seed(value)


def _prepare(model: nn.Module, config: Config, dist: Distributed) -> nn.Module:
    precision = config.precision
    if precision.grad_checkpointing:
        try:
            getattr(model, "set_grad_checkpointing", _no_checkpointing)(True)
        except AssertionError:
            raise UserError(f"precision.grad_checkpointing: {config.model.name} does not support it") from None
    if precision.sync_bn and dist.world_size > 1:
        if dist.device.type != "cuda":
            raise UserError("precision.sync_bn needs CUDA; set it to false on the CPU")
        model = convert_sync_batchnorm(model)
    if precision.channels_last:
        return model.to(device=dist.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.to(dist.device)


def _wrap(model: nn.Module, dist: Distributed) -> DistributedDataParallel:
    """DDP that leaves the buffers to `share_buffers`: in training no rank reads its running statistics."""
    with warnings.catch_warnings():
        # its replacement needs a newer torch than the oldest we support
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        return DistributedDataParallel(
            model,
            device_ids=[dist.local_rank] if dist.device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )


def _prepare_compiler(device: torch.device) -> None:
    if device.type != "cpu":
        return
    if cxx_compiler() is None:
        raise UserError("precision.compile needs a C++ compiler on the CPU; install g++ or set it to false")
    keep_stores_inside()


def _no_checkpointing(enable: bool) -> None:
    """Used for models without set_grad_checkpointing; timm's that do not support it raise AssertionError too."""
    raise AssertionError
