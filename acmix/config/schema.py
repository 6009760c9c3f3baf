"""The schema of a run: every key a config file may hold, and what no two keys may say together."""

import json
from difflib import get_close_matches
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from acmix.config.yaml import KeyPath, write_yaml
from acmix.errors import UserError

_MAX_INT = 2**31 - 1
_MAX_SEED = 2**63 - 1

Count = Annotated[int, Field(ge=0, le=_MAX_INT)]
Positive = Annotated[int, Field(ge=1, le=_MAX_INT)]
Probability = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
Pair = Annotated[tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]], Field(strict=False)]
Betas = Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], ...], Field(strict=False, min_length=2, max_length=3)]
Names = Annotated[tuple[Text, ...], Field(strict=False)]
Mean = Annotated[tuple[Probability, Probability, Probability], Field(strict=False)]
_Std = Annotated[float, Field(gt=0, le=1)]
Std = Annotated[tuple[_Std, _Std, _Std], Field(strict=False)]
AutoAugment = Annotated[str, Field(pattern=r"^(rand|augmix|original|originalr|v0|v0r|3a)(-[a-z]+[0-9]*(\.[0-9]+)?)*$")]


class _Section(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(_Section):
    """What is trained."""

    name: Text = Field(description="Model name known to timm, e.g. acmix_resnet26, acmix_swin_tiny or resnet26.")
    num_classes: Positive | None = Field(default=None, description="Number of classes; null takes it from the data.")
    kwargs: dict[str, JsonValue] = Field(default={}, description="Further arguments of the model, e.g. {stem: cifar}.")
    checkpoint: Text | None = Field(default=None, description="Weights to start from: run, checkpoint or file.")


class DataConfig(_Section):
    """Where the images come from and how they are read."""

    dataset: Text = Field(description="digits, cifar10, cifar100, folder, or a name timm.data.create_dataset takes.")
    root: Text | None = Field(default=None, description="Folder (or file) that holds the data; not needed for digits.")
    train_split: Text = Field(default="train", description="Training split; for folder, a subfolder of root.")
    val_split: Text = Field(default="val", description="Validation split; for folder, likewise.")
    image_size: Annotated[int, Field(ge=1, le=65535)] = Field(default=224, description="Height and width, pixels.")
    batch_size: Positive = Field(default=128, description="Images per process and forward pass in training.")
    val_batch_size: Positive | None = Field(default=None, description="The same in validation; null: batch_size.")
    num_workers: Annotated[int, Field(ge=0, le=1024)] = Field(default=4, description="Loader processes; 0: none.")
    download: bool = Field(default=False, description="Fetch absent data (cifar10, cifar100, torch/...).")
    mean: Mean | None = Field(default=None, description="Mean of R, G, B in 0..1; null: that of the dataset.")
    std: Std | None = Field(default=None, description="Deviation of R, G, B; null: that of the dataset.")
    interpolation: Literal["bicubic", "bilinear", "nearest", "lanczos"] = Field(
        default="bicubic", description="How images are resized."
    )
    crop_pct: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.875,
        description="Share of the resized image the validation centre crop keeps; images up to 64 px: all of it.",
    )
    repeated_aug: Annotated[int, Field(ge=1, le=64)] = Field(default=1, description="Augmented copies per image.")
    on_error: Literal["raise", "skip"] = Field(
        default="raise", description="A training image that cannot be read: raise stops the run, skip leaves it out."
    )
    max_errors: Count = Field(default=100, description="Unreadable images in an epoch that stop the run.")
    prefetch_factor: Annotated[int, Field(ge=1, le=1024)] = Field(default=2, description="Batches ready per worker.")
    pin_memory: bool | None = Field(default=None, description="Page-locked batches; null: only with CUDA.")


class AugmentConfig(_Section):
    """How training images are varied."""

    crop: Literal["random_resized", "pad", "none"] = Field(
        default="random_resized",
        description="random_resized: random area and shape; pad: pad, then crop; none: resize only.",
    )
    scale: Pair = Field(default=(0.08, 1.0), description="Least and greatest area of the random crop, of 1.")
    ratio: Pair = Field(default=(3 / 4, 4 / 3), description="Least and greatest width/height ratio of the random crop.")
    pad: Annotated[int, Field(ge=0, le=1024)] = Field(default=4, description="Pixels added on each side by crop: pad.")
    hflip: Probability = Field(default=0.5, description="Probability of a horizontal flip.")
    color_jitter: NonNegative = Field(default=0.0, description="Strength of colour jitter.")
    auto_augment: AutoAugment | None = Field(
        default=None,
        description="timm's policy, e.g. rand-m9-mstd0.5-inc1; null: none.",
        examples=["rand-m9-mstd0.5-inc1"],
    )
    erase_prob: Probability = Field(default=0.0, description="Probability of random erasing.")
    mixup: NonNegative = Field(default=0.0, description="Mixup alpha; 0: off.")
    cutmix: NonNegative = Field(default=0.0, description="CutMix alpha; 0: off.")
    mixup_prob: Probability = Field(default=1.0, description="Probability that a batch is mixed, where mixing is on.")
    mixup_switch_prob: Probability = Field(default=0.5, description="Share of CutMix where both are on.")


class LossConfig(_Section):
    """What is minimised."""

    name: Literal["cross_entropy", "bce"] = Field(default="cross_entropy", description="Or binary per class.")
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="Share of the target spread evenly."
    )


class OptimizerConfig(_Section):
    """How weights move."""

    name: Text = Field(default="sgd", description="Name of a timm optimizer, e.g. sgd, adamw, lamb.")
    lr: Annotated[float, Field(gt=0)] = Field(default=0.1, description="Peak learning rate.")
    lr_batch: Positive | None = Field(
        default=None, description="Global batch lr is meant for, scaled linearly; null: as is."
    )
    weight_decay: NonNegative = Field(
        default=1e-4, description="Weight decay (never on path weights, norms and biases)."
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.9, description="Momentum, where the optimizer has one."
    )
    betas: Betas | None = Field(default=None, description="Betas of Adam and its kin; null: the optimizer's own.")
    eps: Annotated[float, Field(gt=0)] | None = Field(default=None, description="Epsilon; null: the optimizer's own.")
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="Learning-rate factor from one layer to the one before; null: none."
    )
    path_lr_factor: NonNegative = Field(
        default=1.0, description="Learning-rate factor of the path weights alpha and beta."
    )
    clip_grad: Annotated[float, Field(gt=0)] | None = Field(default=None, description="Gradient clipping; null: none.")
    clip_mode: Literal["norm", "value", "agc"] = Field(default="norm", description="What clip_grad limits.")
    accumulate: Positive = Field(default=1, description="Forward passes per update of the weights.")


class ScheduleConfig(_Section):
    """How long, and the learning rate over time."""

    name: Literal["cosine", "tanh", "poly"] = Field(
        default="cosine", description="Shape of the learning rate, per update."
    )
    epochs: Positive = Field(description="Passes over the training data.")
    warmup_epochs: NonNegative = Field(default=0.0, description="Epochs of linear warm-up, within epochs.")
    warmup_lr: NonNegative = Field(default=1e-6, description="Learning rate at the start of the warm-up.")
    min_lr: NonNegative = Field(default=0.0, description="Learning rate at the end.")
    steps: Positive | None = Field(
        default=None, description="Stop after so many updates (for benchmarks); null: do not."
    )


class PrecisionConfig(_Section):
    """How numbers are held and kernels built."""

    amp: Literal["none", "bf16", "fp16"] = Field(default="none", description="Autocast type; fp16 scales the loss.")
    compile: bool = Field(default=False, description="Compile the model with torch.compile.")
    channels_last: bool = Field(default=False, description="Hold feature maps in the channels-last memory format.")
    grad_checkpointing: bool = Field(
        default=False, description="Recompute activations in the backward pass to save memory."
    )
    sync_bn: bool = Field(default=False, description="Batch norm statistics over all processes.")


class EmaConfig(_Section):
    """A running average of the weights."""

    decay: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None, description="Decay per update; null: no average."
    )
    warmup: bool = Field(default=False, description="Let the decay grow from 0 during the first updates.")


class RunConfig(_Section):
    """Where, on what and how carefully."""

    dir: Text | None = Field(default=None, description="Folder of the run; null: runs/NAME/DATE-TIME.")
    name: Annotated[str, Field(pattern=r"^[^/\\\x00-\x1f.][^/\\\x00-\x1f]*$", max_length=200)] | None = Field(
        default=None, description="Name of the run; null: that of the config file.", examples=["try-1"]
    )
    seed: Annotated[int, Field(ge=0, le=_MAX_SEED)] = Field(default=0, description="Seed of everything random.")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: CUDA if there is any.")
    log_every: Positive = Field(default=50, description="Updates from one logged line to the next.")
    probes: Names = Field(default=("paths",), description="What to measure of the model as it trains; []: nothing.")
    checkpoint_every: Count = Field(
        default=0, description="Updates from one checkpoint to the next; 0: each epoch only."
    )
    keep: Positive = Field(default=3, description="Newest checkpoints to keep, besides the best.")
    eval_every: Positive = Field(default=1, description="Epochs from one validation to the next.")
    eval_ema: bool = Field(default=True, description="Validate the averaged weights, where ema.decay is set.")
    on_save_error: Literal["stop", "continue"] = Field(
        default="stop", description="When a checkpoint cannot be written."
    )
    background_save: bool = Field(default=True, description="Write checkpoints while training goes on.")
    skip_nonfinite: Count = Field(
        default=0, description="Updates with a loss that is not finite to skip before stopping."
    )
    timeout: Annotated[float, Field(gt=0, le=_MAX_INT)] = Field(
        default=1800.0, description="Seconds after which a process that hangs stops the run."
    )
    threads: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        default=None, description="CPU threads; null: torch's choice."
    )
    deterministic: bool = Field(default=False, description="Deterministic kernels only, where they cost speed too.")


class Config(_Section):
    """Everything a run is made from."""

    model: ModelConfig = Field(description="What is trained.")
    data: DataConfig = Field(description="Where the images come from and how they are read.")
    augment: AugmentConfig = Field(default=AugmentConfig(), description="How training images are varied.")
    loss: LossConfig = Field(default=LossConfig(), description="What is minimised.")
    optimizer: OptimizerConfig = Field(default=OptimizerConfig(), description="How weights move.")
    schedule: ScheduleConfig = Field(description="How long, and the learning rate over time.")
    precision: PrecisionConfig = Field(default=PrecisionConfig(), description="How numbers are held and kernels built.")
    ema: EmaConfig = Field(default=EmaConfig(), description="A running average of the weights.")
    run: RunConfig = Field(default=RunConfig(), description="Where, on what and how carefully.")

    def dump(self) -> str:
        """The whole config, defaults included, as YAML that loads back to an equal Config."""
        return write_yaml(self.model_dump(mode="json"))


DATASETS = ("digits", "cifar10", "cifar100", "folder", "imagefolder", "image_folder", "tar", "wds/", "torch/", "hfds/")
"""Names of `data.dataset`; those with a slash are prefixes."""
ROOTLESS = ("digits", "hfds/")
"""Datasets that need no `data.root`."""
STREAMS = ("hfids/", "tfds/")
"""timm's datasets that can only be read from their beginning, in an order of their own; refused."""


def dataset_kind(dataset: str) -> str:
    """The entry of DATASETS that serves this `data.dataset`. Raises UserError naming the nearest."""
    prefix, slash, _ = dataset.partition("/")
    kind = prefix.lower() + slash if slash else dataset
    if kind in STREAMS:
        raise UserError(
            f"{dataset!r}: {kind} streams cannot be replayed from the middle of an epoch nor counted exactly; "
            "use hfds/ (random access), wds/, tar or folder"
        )
    if kind not in DATASETS:
        nearest = get_close_matches(dataset, DATASETS, n=1, cutoff=0)[0]
        raise UserError(f"unknown dataset {dataset!r}; nearest: {nearest} (all: {', '.join(DATASETS)})")
    return kind


def contradictions(config: Config) -> list[tuple[KeyPath, str]]:
    """Keys that are each valid and yet do not fit together: key path and what is wrong."""
    data, augment, schedule, optimizer = config.data, config.augment, config.schedule, config.optimizer
    found: list[tuple[KeyPath, str]] = []
    try:
        dataset_kind(data.dataset)
    except UserError as error:
        return [(("data", "dataset"), str(error))]
    if "num_classes" in config.model.kwargs:
        found.append((("model", "kwargs", "num_classes"), "has a key of its own: model.num_classes"))
    if schedule.warmup_epochs > schedule.epochs:
        text = f"{schedule.warmup_epochs:g} is more than schedule.epochs, {schedule.epochs}"
        found.append((("schedule", "warmup_epochs"), text))
    if optimizer.lr_batch is None and schedule.min_lr > optimizer.lr:
        found.append((("schedule", "min_lr"), f"{schedule.min_lr:g} is above optimizer.lr, {optimizer.lr:g}"))
    if data.root is None and not data.dataset.startswith(ROOTLESS):
        found.append((("data", "root"), f"is required for the dataset {data.dataset}: the folder that holds the data"))
    if data.download and data.dataset not in ("cifar10", "cifar100") and not data.dataset.startswith("torch/"):
        found.append((("data", "download"), f"the dataset {data.dataset} cannot be downloaded; set it to false"))
    for name, (low, high) in (("scale", augment.scale), ("ratio", augment.ratio)):
        if low > high:
            found.append((("augment", name), f"the least, {low:g}, is above the greatest, {high:g}"))
    if augment.scale[1] > 1:
        found.append((("augment", "scale"), f"{augment.scale[1]:g} is more than 1, the whole image"))
    if (augment.mixup or augment.cutmix) and data.batch_size % 2:
        text = f"{data.batch_size} is odd, but augment.mixup and augment.cutmix mix pairs; use an even number"
        found.append((("data", "batch_size"), text))
    return found


def json_schema() -> str:
    """The JSON schema of a config file, for editors; the text of `configs/schema.json`."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}
    return json.dumps(schema, indent=2) + "\n"
