"""How far a run is, and what a checkpoint must share with a run that continues it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Self

from acmix.config import Config, RunConfig, ScheduleConfig
from acmix.errors import UserError

if TYPE_CHECKING:
    from acmix.data.loader import Data


@dataclass
class Progress:
    """How far a run is; saved with every checkpoint as JSON.

    step: steps taken so far; epoch: the current epoch, from 0; update_in_epoch: the steps taken of it; best: the
    evaluation with the highest top-1 so far, of those with a finite loss; history: every evaluation; skipped: steps
    left out because their loss was not finite; unread: images of this epoch left out because they cannot be read.
    """

    step: int = 0
    epoch: int = 0
    update_in_epoch: int = 0
    best: dict[str, Any] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    skipped: int = 0
    unread: int = 0

    @classmethod
    def restore(cls, saved: Mapping[str, Any]) -> Self:
        """What a checkpoint says; floats that JSON has as strings, because they are not finite, are floats again."""
        progress = cls(**{key: saved[key] for key in asdict(cls())})
        progress.history = [_with_floats(row) for row in progress.history]
        progress.best = None if progress.best is None else _with_floats(progress.best)
        return progress


def _with_floats(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: float(value) if isinstance(value, str) else value for key, value in row.items()}


def is_finite(evaluation: Mapping[str, Any]) -> bool:
    """Whether an evaluation, also one read back from JSON, says anything of the network: not where it has diverged."""
    return math.isfinite(float(evaluation.get("loss", 0.0)))


def run_fingerprint(config: Config, data: "Data", world_size: int) -> dict[str, Any]:
    """What a checkpoint records of its run; all but `world_size` and `config` must be the same to continue it."""
    return {
        "model_name": config.model.name,
        "classes": data.classes,
        "seed": config.run.seed,
        "global_batch": data.train.global_batch,
        "updates_per_epoch": data.train.updates_per_epoch,
        "world_size": world_size,
        "config": config.model_dump(mode="json"),
    }


def total_updates(schedule: ScheduleConfig, updates_per_epoch: int) -> int:
    """Updates of the weights from the beginning of a run to its end."""
    whole = schedule.epochs * updates_per_epoch
    return min(whole, schedule.steps or whole)


def out_of_patience(run: RunConfig, history: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the last `run.patience` evaluations all failed to beat the best before them by `run.min_delta`.

    One whose loss is not finite beats none. It follows from the evaluations alone, so a resumed run counts on as if
    nothing had happened.
    """
    best, since = -math.inf, 0
    for evaluation in history:
        if is_finite(evaluation) and evaluation["top1"] > best + run.min_delta:
            best, since = evaluation["top1"], 0
        else:
            since += 1
    return 0 < run.patience <= since


def refuse_shorter(schedule: ScheduleConfig, step: int, updates_per_epoch: int) -> None:
    """UserError when the schedule ends before `step`, which the run has reached already."""
    if schedule.epochs * updates_per_epoch < step:
        given, least = f"schedule.epochs: {schedule.epochs}", f"{-(-step // updates_per_epoch)} epochs"
    elif schedule.steps is not None and schedule.steps < step:
        given, least = f"schedule.steps: {schedule.steps}", f"{step} updates"
    else:
        return
    raise UserError(
        f"{given} is less than the run has done already, {step} updates of {updates_per_epoch} an epoch; give at least "
        f"{least}, or start a new run in another run.dir"
    )


_KEYS = {
    "model_name": "model.name",
    "classes": "the classes of the data (data.dataset, data.root)",
    "seed": "run.seed",
    "updates_per_epoch": "the number of updates per epoch (training images of data.root, data.repeated_aug)",
}


def refuse_other_run(saved: dict[str, Any], mine: dict[str, Any]) -> None:
    """UserError when a checkpoint cannot be continued exactly with this config, data and number of processes."""
    if saved["global_batch"] != mine["global_batch"]:
        raise UserError(
            f"the checkpoint was made with {saved['global_batch']} images per update on {saved['world_size']} "
            f"process(es), now it is {mine['global_batch']} on {mine['world_size']}; set data.batch_size and "
            f"optimizer.accumulate so that batch_size × accumulate × processes = {saved['global_batch']}"
        )
    for key, name in _KEYS.items():
        if saved[key] != mine[key]:
            raise UserError(
                f"the checkpoint belongs to another run: {name} was {brief(saved[key])}, now it is {brief(mine[key])}; "
                "give it as it was, or start a new run"
            )


def brief(value: Any, limit: int = 8) -> str:
    """A value for a message; of a long list the first entries and their number."""
    if not isinstance(value, list):
        return str(value)
    shown = ", ".join(map(str, value[:limit]))
    return f"[{shown}, … {len(value)} in all]" if len(value) > limit else f"[{shown}]"
