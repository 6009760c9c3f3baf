"""The schema of a run: every key a config file may hold, section by section."""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue

from acmix.config.class_weights import ClassWeights
from acmix.config.image_values import ImageSize, Mean, Probability, Share, Std
from acmix.config.kinds import IS_PATH, path_keys, without_nul
from acmix.config.yaml import write_yaml
from acmix.paths import escape_path

_MAX_INT = 2**31 - 1
_MAX_SEED = 2**63 - 1

Count = Annotated[int, Field(ge=0, le=_MAX_INT)]
Positive = Annotated[int, Field(ge=1, le=_MAX_INT)]
NonNegative = Annotated[float, Field(ge=0)]
AboveZero = Annotated[float, Field(gt=0)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]
PathText = Annotated[Text, AfterValidator(without_nul), IS_PATH]
RunName = Annotated[str, Field(pattern=r"^[^/\\\x00-\x1f.][^/\\\x00-\x1f]*$", max_length=200)]
Names = Annotated[tuple[Text, ...], Field(strict=False)]
AutoAugment = Annotated[str, Field(pattern=r"^(rand|augmix|original|originalr|v0|v0r|3a)(-[a-z]+[0-9]*(\.[0-9]+)?)*$")]
Pair = Annotated[tuple[AboveZero, AboveZero], Field(strict=False)]
Betas = Annotated[tuple[BelowOne, ...], Field(strict=False, min_length=2, max_length=3)]


class _Section(BaseModel):
    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelConfig(_Section):
    """What is trained."""

    name: Text
    """Model name known to timm, e.g. acmix_resnet26, acmix_swin_tiny or resnet26."""

    num_classes: Positive | None = None
    """Number of classes; null takes it from the data."""

    kwargs: dict[str, JsonValue] = {}
    """Further keyword arguments of the model, e.g. {stem: cifar}."""

    checkpoint: PathText | None = None
    """Weights to start from: a run folder, a checkpoint or a weights file."""

    @property
    def in_chans(self) -> Any:
        """Channels of the images, as kwargs say; 3 unless given."""
        given = self.kwargs.get("in_chans")
        return 3 if given is None else given


class DataConfig(_Section):
    """Where the images come from and how they are read."""

    dataset: Text
    """digits, cifar10, cifar100, imagenet, folder, tar, wds/NAME, torch/NAME, hfds/NAME, or a registered dataset."""

    root: PathText | None = None
    """Folder (or file) that holds the data, of shards also http(s)://ADDRESS; not needed for digits."""

    train_split: Text = "train"
    """Training split; for folder, a subfolder of root."""

    val_split: Text = "val"
    """Validation split; for folder, a subfolder of root."""

    class_order: Literal["sorted", "natural"] | None = None
    """Order of classes: sorted as text, or natural (timm's); null: sorted for folder, tar, wds/, else as published."""

    classes: PathText | None = None
    """File that names all classes in order, one a line or a JSON list; null: those of the training data."""

    labels: PathText | None = None
    """For folder: file with the classes of images that lie in no class folders; {split} in it: train or val."""

    image_size: ImageSize = 224
    """Side of a square image, or [height, width]; pixels."""

    batch_size: Positive = 128
    """Images per process and forward pass in training."""

    val_batch_size: Positive | None = None
    """The same in validation; null: batch_size."""

    loader: Literal["auto", "workers", "resident"] = "auto"
    """workers: read anew in each epoch; resident: decoded once, kept in memory; auto: resident where that can be."""

    num_workers: Annotated[int, Field(ge=0, le=1024)] | Literal["auto"] = "auto"
    """Loader processes; 0: the training process loads the images itself; auto: by the cores there are."""

    cache_dir: PathText | None = None
    """For shards on a web server: folder that keeps them; null: $ACMIX_CACHE/shards or ~/.cache/acmix/shards."""

    cache_size: AboveZero | None = None
    """Gigabytes (10⁹ bytes) that the folder may hold; those used least recently make room; null: no limit."""

    download: bool = False
    """Download missing data (cifar10, cifar100, torch/NAME)."""

    mean: Mean | None = None
    """Mean of R, G, B in 0..1, or one number for all (or for grey images); null: that of the dataset."""

    std: Std | None = None
    """Standard deviation, in the same form; null: that of the dataset."""

    interpolation: Literal["bicubic", "bilinear", "nearest", "lanczos"] = "bicubic"
    """How images are resized."""

    decoder: Literal["auto", "pillow", "draft", "simplejpeg"] = "auto"
    """JPEG decoder; auto: simplejpeg, else Pillow's draft mode, with the same pixels; pillow: at full size only."""

    crop_pct: Share = 0.875
    """Share of the resized image that the centre crop keeps in validation; up to image_size 64: all of it."""

    repeated_aug: Annotated[int, Field(ge=1, le=64)] = 1
    """Augmented copies of each image, side by side in the batch."""

    on_error: Literal["raise", "skip"] = "raise"
    """A training image that cannot be read: raise stops the run, skip leaves it out."""

    max_errors: Count = 100
    """Unreadable images that an epoch may skip; one more stops the run."""

    prefetch_factor: Annotated[int, Field(ge=1, le=1024)] = 2
    """Batches that each loader process prepares ahead."""

    pin_memory: bool | None = None
    """Batches in page-locked memory; null: only with CUDA."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size


class AugmentConfig(_Section):
    """How training images are augmented."""

    crop: Literal["random_resized", "pad", "none"] = "random_resized"
    """random_resized: random area and shape; pad: pad, then crop; none: resize only."""

    scale: Pair = (0.08, 1.0)
    """Smallest and largest area of the random crop, as a share of the image."""

    ratio: Pair = (3 / 4, 4 / 3)
    """Smallest and largest width/height ratio of the random crop."""

    pad: Annotated[int, Field(ge=0, le=1024)] = 4
    """Pixels added on each side by crop: pad."""

    hflip: Probability = 0.5
    """Probability of a horizontal flip."""

    color_jitter: NonNegative = 0.0
    """Strength of colour jitter."""

    auto_augment: AutoAugment | None = Field(default=None, examples=["rand-m9-mstd0.5-inc1"])
    """Augmentation policy of timm, e.g. rand-m9-mstd0.5-inc1; null: none."""

    erase_prob: Probability = 0.0
    """Probability of random erasing."""

    mixup: NonNegative = 0.0
    """Mixup alpha; 0: off."""

    cutmix: NonNegative = 0.0
    """CutMix alpha; 0: off."""

    mixup_prob: Probability = 1.0
    """Probability that a batch is mixed, when mixup or cutmix is on."""

    mixup_switch_prob: Probability = 0.5
    """Probability of CutMix rather than mixup, when both are on."""


class LossConfig(_Section):
    """What is minimised."""

    name: Literal["cross_entropy", "bce"] = "cross_entropy"
    """cross_entropy: softmax over the classes; bce: binary cross-entropy per class."""

    label_smoothing: BelowOne = 0.0
    """Share of the target spread evenly over all classes."""

    class_weights: ClassWeights = "none"
    """In training: none, balanced (by the images of a class), {CLASS: WEIGHT} (1 unless named) or a list in order."""


class OptimizerConfig(_Section):
    """How the weights are updated."""

    name: Text = "sgd"
    """Name of a timm optimizer, e.g. sgd, adamw, lamb."""

    lr: AboveZero = 0.1
    """Peak learning rate."""

    lr_batch: Positive | None = None
    """Global batch size for which lr is given, scaled linearly to the actual one; null: lr as given."""

    weight_decay: NonNegative = 1e-4
    """Weight decay (never on norms and biases; path weights have their own)."""

    momentum: BelowOne = 0.9
    """Momentum, for optimizers that have one."""

    betas: Betas | None = None
    """Betas of Adam and similar optimizers; null: the optimizer's own."""

    eps: AboveZero | None = None
    """Epsilon; null: the optimizer's own."""

    layer_decay: Share | None = None
    """Factor on the learning rate from each layer to the one before it; null: none."""

    path_lr_factor: NonNegative = 1.0
    """Learning-rate factor of the path weights alpha and beta."""

    path_weight_decay: NonNegative = 0.0
    """Weight decay of the path weights alpha and beta, which pulls both paths to zero."""

    path_freeze_epochs: NonNegative = 0.0
    """Epochs at the beginning in which the path weights stay as they start."""

    new_lr_factor: NonNegative | None = None
    """Learning-rate factor of what scripts/grow.py says is new in model.checkpoint; null: no groups of their own."""

    clip_grad: AboveZero | None = None
    """Limit of gradient clipping; null: no clipping."""

    clip_mode: Literal["norm", "value", "agc"] = "norm"
    """What clip_grad limits."""

    accumulate: Positive = 1
    """Forward passes per update of the weights (gradient accumulation)."""

    kwargs: dict[str, JsonValue] = {}
    """Further arguments of the optimizer, e.g. {nesterov: true}."""


class ScheduleConfig(_Section):
    """Length of the run, and the learning rate over time."""

    name: Literal["cosine", "tanh", "poly"] = "cosine"
    """Shape of the learning-rate curve, which is followed update by update."""

    epochs: Positive
    """Passes over the training data."""

    warmup_epochs: NonNegative = 0.0
    """Epochs of linear warm-up, included in epochs."""

    warmup_lr: NonNegative = 1e-6
    """Learning rate at the start of the warm-up."""

    min_lr: NonNegative = 0.0
    """Learning rate at the end."""

    steps: Positive | None = None
    """Stop after this many updates (for benchmarks); null: after the last epoch."""

    kwargs: dict[str, JsonValue] = {}
    """Further arguments of timm's create_scheduler_v2, e.g. {k_decay: 1.5}."""


class PrecisionConfig(_Section):
    """Number formats, compilation, memory layout."""

    amp: Literal["none", "bf16", "fp16"] = "none"
    """Autocast type; fp16 scales the loss."""

    compile: bool = False
    """Compile the model with torch.compile."""

    compile_cache: PathText | None = None
    """Folder that keeps what torch.compile made, for the next start; null: compiled/ in the run's folder."""

    channels_last: bool = False
    """Hold feature maps in the channels-last memory format."""

    grad_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""

    sync_bn: bool = False
    """Batch-norm statistics over all processes."""


class EmaConfig(_Section):
    """A running average of the weights."""

    decay: BelowOne | None = None
    """Decay per update; null: no average."""

    warmup: bool = False
    """Let the decay grow from 0 during the first updates."""


class PathsConfig(_Section):
    """How the paths of ACmix blocks are measured on images while training; run.probes says whether."""

    every: Positive = 100
    """Updates from one measurement to the next; the run's start and end are measured too."""

    images: Positive = 16
    """Validation images, evenly spaced, that are measured each time."""


class RunConfig(_Section):
    """Output folder, device, logging, checkpoints."""

    dir: PathText | None = None
    """Folder of the run; null: runs/NAME/DATE-TIME."""

    name: RunName | None = Field(default=None, examples=["try-1"])
    """Name of the run; null: that of the config file."""

    seed: Annotated[int, Field(ge=0, le=_MAX_SEED)] = 0
    """Seed of everything random."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if available, else the CPU."""

    log_every: Positive = 50
    """Updates from one logged line to the next; the last of an epoch and of the run are logged too."""

    loggers: Annotated[tuple[Literal["tensorboard", "csv", "wandb", "mlflow"], ...], Field(strict=False)] = (
        "tensorboard",
    )
    """Where rows are shown besides metrics.jsonl; csv: train.csv and eval.csv; wandb and mlflow: their packages."""

    probes: Names = ("paths", "path_balance", "path_shares")
    """What to measure of the model as it trains; []: nothing."""

    checkpoint_every: Count = 0
    """Updates from one checkpoint to the next; 0: only after each epoch."""

    keep: Positive = 3
    """Newest checkpoints to keep, besides the best."""

    eval_every: Positive = 1
    """Epochs from one validation to the next."""

    patience: Count = 0
    """Evaluations in a row without a better top-1 after which the run ends; its schedule stays as it is; 0: never."""

    min_delta: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Points of top-1 by which an evaluation must beat the best before it, for run.patience."""

    eval_ema: bool = True
    """Validate the averaged weights, if ema.decay is set."""

    on_save_error: Literal["stop", "continue"] = "stop"
    """What to do when a checkpoint cannot be written."""

    background_save: bool = True
    """Write checkpoints while training goes on."""

    skip_nonfinite: Count = 0
    """Updates with a non-finite loss to skip before the run stops."""

    timeout: Annotated[float, Field(gt=0, le=_MAX_INT)] = 1800.0
    """Seconds after which a process that hangs stops the run."""

    threads: Annotated[int, Field(ge=1, le=4096)] | None = None
    """CPU threads; null: torch's choice."""

    deterministic: bool = False
    """Deterministic kernels only, even where they are slower."""


class Config(_Section):
    """Everything a run is made from."""

    model: ModelConfig
    data: DataConfig
    augment: AugmentConfig = AugmentConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig
    precision: PrecisionConfig = PrecisionConfig()
    ema: EmaConfig = EmaConfig()
    paths: PathsConfig = PathsConfig()
    run: RunConfig = RunConfig()

    def dump(self) -> str:
        """The whole config, defaults included, as YAML that `load_config` reads back to an equal Config.

        Paths stand in it as the run uses them, with `~` and variables replaced; a `$` in one is written `$$`.
        """
        values = self.model_dump(mode="json")
        for section, key in path_keys(type(self)):
            if values[section][key] is not None:
                values[section][key] = escape_path(values[section][key])
        return write_yaml(values)


def json_schema() -> str:
    """The JSON schema of a config file, for editors; the text of `configs/schema.json`."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}
    return json.dumps(schema, indent=2) + "\n"
