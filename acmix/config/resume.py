"""What of a config may change when a run is resumed: one verdict for each key of the schema. Light on purpose."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic.fields import FieldInfo

from acmix.config.schema import Config
from acmix.errors import UserError

Changes = dict[str, tuple[Any, Any]]
"""Key → the value that the checkpoint was made with and the value now."""

NEW_RUN = "give it as it was, or start a new run from the weights with model.checkpoint=RUN"


@dataclass(frozen=True)
class Verdict:
    """Whether a key may change at a resume.

    kind: `free`; `fixed`: it may not; `no switch`: its value may, but not from or to null; `fits`: as long as the
    checkpoint's state fits what the new value builds; `data`: as long as the classes, the images per update and the
    updates per epoch stay; `place`: where the run is, no change of the run.
    note: what a change brings; `on` and `off` instead of it when the change turns something on or off (null, 0, none).
    """

    kind: Literal["free", "fixed", "no switch", "fits", "data", "place"]
    note: str = ""
    on: str = ""
    off: str = ""

    def refuses(self, old: object, new: object) -> bool:
        """Whether the change is refused whatever the checkpoint holds."""
        return self.kind == "fixed" or (self.kind == "no switch" and (old is None) != (new is None))

    def consequence(self, old: object, new: object) -> str:
        """What an allowed change brings; empty if nothing needs to be said."""
        if self.on and _is_off(old):
            return self.on
        return self.off if self.off and _is_off(new) else self.note


_FREE = Verdict("free")
_DATA = Verdict("data")
_LR = Verdict("free", "the learning rate follows the new schedule from here on")
_IMAGES = Verdict("free", "the images differ from here on")
_LOSS = Verdict("free", "the loss before and after cannot be compared")
_SCORES = Verdict("free", "evaluations before and after cannot be compared")
_STATE = Verdict("fits")

_OTHER_NETWORK = (
    "act_layer", "global_pool", "heads", "in_chans", "kernel_att", "kernel_conv", "mix", "norm_layer", "num_heads",
    "shift", "shift_size", "window_size",
)  # fmt: skip
"""Arguments that make another network of weights that still fit."""

_SAME_NETWORK = ("drop_path_rate", "drop_rate", "impl", "proj_drop_rate", "attn_drop_rate", "pos_drop_rate")
"""Arguments that change how it is trained or computed, not what the network computes."""

VERDICTS: dict[str, Verdict] = {
    "model.name": Verdict("fixed"),
    "model.num_classes": _DATA,
    "model.kwargs": Verdict("fits", "the network may compute something else from here on"),
    **{f"model.kwargs.{name}": Verdict("fixed") for name in _OTHER_NETWORK},
    **{f"model.kwargs.{name}": _FREE for name in _SAME_NETWORK},
    "model.checkpoint": Verdict("free", "without effect: the weights come from the run's own checkpoint"),
    "data.dataset": _DATA,
    "data.root": _DATA,
    "data.train_split": _DATA,
    "data.val_split": _DATA,
    "data.class_order": _DATA,
    "data.classes": _DATA,
    "data.labels": _DATA,
    "data.image_size": Verdict("fits", "images and evaluations differ from here on"),
    "data.batch_size": _DATA,
    "data.val_batch_size": _FREE,
    "data.loader": Verdict("free", "the images are augmented by other random numbers from here on"),
    "data.num_workers": _FREE,
    "data.cache_dir": _FREE,
    "data.cache_size": _FREE,
    "data.download": _FREE,
    "data.mean": _IMAGES,
    "data.std": _IMAGES,
    "data.interpolation": _IMAGES,
    "data.decoder": _IMAGES,
    "data.crop_pct": _SCORES,
    "data.repeated_aug": Verdict("fixed"),
    "data.on_error": _FREE,
    "data.max_errors": _FREE,
    "data.prefetch_factor": _FREE,
    "data.pin_memory": _FREE,
    "augment.crop": _IMAGES,
    "augment.scale": _IMAGES,
    "augment.ratio": _IMAGES,
    "augment.pad": _IMAGES,
    "augment.hflip": _IMAGES,
    "augment.color_jitter": _IMAGES,
    "augment.auto_augment": _IMAGES,
    "augment.erase_prob": _IMAGES,
    "augment.mixup": _LOSS,
    "augment.cutmix": _LOSS,
    "augment.mixup_prob": _LOSS,
    "augment.mixup_switch_prob": _LOSS,
    "loss.name": _LOSS,
    "loss.label_smoothing": _LOSS,
    "loss.class_weights": _LOSS,
    "optimizer.name": Verdict("fixed"),
    "optimizer.lr": _FREE,
    "optimizer.lr_batch": _FREE,
    "optimizer.weight_decay": _STATE,
    "optimizer.momentum": _STATE,
    "optimizer.betas": _STATE,
    "optimizer.eps": _STATE,
    "optimizer.layer_decay": Verdict("no switch"),
    "optimizer.path_lr_factor": _FREE,
    "optimizer.path_weight_decay": _FREE,
    "optimizer.path_freeze_epochs": _FREE,
    "optimizer.new_lr_factor": Verdict("no switch"),
    "optimizer.clip_grad": _FREE,
    "optimizer.clip_mode": _FREE,
    "optimizer.accumulate": _DATA,
    "optimizer.kwargs": _STATE,
    "schedule.name": _LR,
    "schedule.epochs": _LR,
    "schedule.warmup_epochs": _LR,
    "schedule.warmup_lr": _LR,
    "schedule.min_lr": _LR,
    "schedule.steps": Verdict("free", "the run ends at another update; the learning rate does not depend on it"),
    "schedule.kwargs": _LR,
    "precision.amp": Verdict("free", "rounding differs from here on"),
    "precision.compile": _FREE,
    "precision.compile_cache": _FREE,
    "precision.channels_last": _FREE,
    "precision.grad_checkpointing": _FREE,
    "precision.sync_bn": _FREE,
    "ema.decay": Verdict("free", on="the average starts from the weights as they are", off="the average is dropped"),
    "ema.warmup": _FREE,
    "paths.every": _FREE,
    "paths.images": Verdict("free", "shares and entropies are measured on other images from here on"),
    "run.dir": Verdict("place"),
    "run.name": _FREE,
    "run.seed": Verdict("fixed"),
    "run.device": _FREE,
    "run.log_every": _FREE,
    "run.loggers": _FREE,
    "run.probes": _FREE,
    "run.checkpoint_every": _FREE,
    "run.keep": _FREE,
    "run.eval_every": _FREE,
    "run.patience": _FREE,
    "run.min_delta": _FREE,
    "run.eval_ema": _SCORES,
    "run.on_save_error": _FREE,
    "run.background_save": _FREE,
    "run.skip_nonfinite": _FREE,
    "run.timeout": _FREE,
    "run.threads": _FREE,
    "run.deterministic": _FREE,
}


_BEFORE_THE_KEY = {"data.loader": "workers", "data.decoder": "pillow"}
"""What runs did that are older than a key, where that is not its default."""


def settled(config: Config, saved: Mapping[str, Any] | None) -> Config:
    """The config with each `auto` as what the checkpoint to continue was made with; `saved` is its config."""
    if saved is None:
        return config
    before, values = saved.get("data", {}), {}
    for name, oldest in _BEFORE_THE_KEY.items():
        key = name.removeprefix("data.")
        if getattr(config.data, key) == "auto":
            values[key] = before.get(key, oldest)
    return config.model_copy(update={"data": config.data.model_copy(update=values)})


def with_loader(config: Config, loader: str) -> Config:
    """The config with another value of `data.loader`."""
    return config.model_copy(update={"data": config.data.model_copy(update={"loader": loader})})


def changed_keys(saved: Mapping[str, Any] | None, config: Config) -> Changes:
    """The keys whose value is not the one that a checkpoint was made with; those below `kwargs` one by one.

    `saved` is the config as the checkpoint records it; None, of one that does not, tells of no change. Keys that it
    lacks, because it is older, had their default, or did what `_BEFORE_THE_KEY` says; keys that the schema no longer
    has are left out. `auto` changes nothing.
    """
    if saved is None:
        return {}
    now = settled(config, saved).model_dump(mode="json")
    changes: Changes = {}
    for section, info in Config.model_fields.items():
        fields = info.annotation.model_fields  # type: ignore[union-attr]
        before = saved.get(section, {})
        for key, field in fields.items():
            name, new = f"{section}.{key}", now[section][key]
            if key not in before and field.is_required():
                continue
            old: Any = before.get(key, _before(name, field))
            pairs = _entries(name, old, new) if key == "kwargs" else [(name, old, new)]
            changes.update({path: (a, b) for path, a, b in pairs if a != b and VERDICTS[name].kind != "place"})
    return changes


def values_before_keys() -> dict[str, dict[str, Any]]:
    """Section → key → what runs did that are older than the key, for the keys that are not required."""
    return {
        section: {
            key: _before(f"{section}.{key}", field)
            for key, field in info.annotation.model_fields.items()  # type: ignore[union-attr]
            if not field.is_required()
        }
        for section, info in Config.model_fields.items()
    }


def refuse_fixed(changes: Changes) -> None:
    """UserError, a line for each key that may not change at a resume."""
    refused = {key: pair for key, pair in changes.items() if verdict_of(key).refuses(*pair)}
    if refused:
        raise UserError(f"the checkpoint belongs to another run: {_told(refused)}; {NEW_RUN}")


def explain_misfit(problem: str, changes: Changes) -> str:
    """Why a checkpoint's state does not fit: first the changed keys that may be the reason."""
    suspects = {key: pair for key, pair in changes.items() if verdict_of(key).kind in ("fits", "data")}
    return f"{_told(suspects)}: {problem}; {NEW_RUN}" if suspects else problem


def describe_changes(changes: Changes) -> list[str]:
    """A line for each changed key: its values and what the change brings."""
    lines = []
    for key, (old, new) in changes.items():
        consequence = verdict_of(key).consequence(old, new)
        lines.append(f"Changed: {key} was {shown(old)}, now {shown(new)}" + (f"; {consequence}" if consequence else ""))
    return lines


def verdict_of(key: str) -> Verdict:
    """The verdict on a key path; one below `kwargs` without a verdict of its own has that of its `kwargs`."""
    return VERDICTS.get(key) or VERDICTS[".".join(key.split(".")[:2])]


def shown(value: object) -> str:
    """A value as a config has it, on one line."""
    return json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value


def _told(changes: Changes) -> str:
    return ", ".join(f"{key} was {shown(old)}, now it is {shown(new)}" for key, (old, new) in changes.items())


def _entries(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for key in [*old, *(key for key in new if key not in old)]:
        yield f"{name}.{key}", old.get(key), new.get(key)


def _before(name: str, field: FieldInfo) -> Any:
    default = field.get_default()
    return _BEFORE_THE_KEY.get(name, list(default) if isinstance(default, tuple) else default)


def _is_off(value: object) -> bool:
    return value in (None, 0, "none")
