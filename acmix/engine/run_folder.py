"""Which folder a run writes to, and what an earlier attempt left there. Light on purpose (no torch)."""

import json
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acmix.checkpoint.layout import ABANDONED, CHECKPOINTS, list_checkpoints, names_something
from acmix.checkpoint.manifest import PROGRESS_FILE
from acmix.config import Config
from acmix.config.resume import changed_keys, refuse_fixed
from acmix.engine.lock import LOCK_NAME
from acmix.engine.progress import out_of_patience, refuse_shorter, total_updates
from acmix.errors import UserError
from acmix.paths import expand_path, missing_path_hint
from acmix.process.program import REQUEUE
from acmix.telemetry.record import read_rows

if TYPE_CHECKING:
    from acmix.checkpoint.snapshot import Snapshot

RUNS = Path("runs")
SUMMARY = "summary.json"
CONFIG = "config.yaml"
CLASSES = "classes.json"
COMPILED = "compiled"
METRICS = "metrics.jsonl"
_TRACES = (CONFIG, METRICS, CHECKPOINTS, SUMMARY)


@dataclass(frozen=True)
class RunChoice:
    """Where a run begins, or what it continues.

    folder: the run folder; None for a new one named after the time. checkpoint: the run or checkpoint to continue from;
    None to begin. or_begin: begin if the run to continue has no checkpoint yet. status, message: set when there is
    nothing to do. new: the folder must hold no run, which whoever has locked it finds out for good (`refuse_held`).
    """

    folder: Path | None = None
    checkpoint: Path | None = None
    or_begin: bool = False
    new: bool = False
    status: int | None = None
    message: str = ""


def choose_run(config: Config, resume: str) -> RunChoice:
    """Decide what `--resume none|auto|PATH` and `run.dir` mean, without touching anything.

    Raises UserError when a new run would land in a folder that holds one, or PATH does not exist.
    """
    folder = None if config.run.dir is None else Path(config.run.dir)
    if folder is not None and folder.exists() and not folder.is_dir():
        raise UserError(f"run.dir: {folder} is not a folder; choose another run.dir")
    if (restarted := _run_of_this_launcher(config, folder)) is not None:
        return _continue_restarted(restarted, resume)
    if resume == "none":
        if folder is not None:
            refuse_held(folder)
        return RunChoice(folder, new=True)
    if resume == "auto":
        return _choose_automatically(config, folder)
    return _choose_explicitly(Path(expand_path(resume, "--resume")), folder)


def refuse_held(folder: Path, checkpoint: Path | None = None) -> None:
    """UserError where a folder holds a run, and is to hold one that begins or goes on from a checkpoint elsewhere."""
    if not holds_run(folder):
        return
    if checkpoint is None:
        raise UserError(
            f"run.dir: {folder} already holds a run; continue it with --resume auto, or choose another run.dir"
        )
    raise UserError(
        f"run.dir: {folder} already holds another run than --resume {checkpoint}; choose another run.dir, or leave it "
        "out to go on in the run the checkpoint belongs to"
    )


def holds_run(folder: Path) -> bool:
    """Whether a folder holds a run with something to lose: a checkpoint, or a logged row of a step.

    What a run left that ended before its first update may be overwritten. A file of a run's name counts as one where
    there is no lock file: then it is not a run's, or nobody can tell.
    """
    if not _has_traces(folder):
        return False
    saved = folder / CHECKPOINTS
    if not (folder / LOCK_NAME).exists() or list_checkpoints(saved) or list_checkpoints(saved / ABANDONED):
        return True
    try:
        return any(row["step"] > 0 for row in read_rows(folder / METRICS))
    except OSError:
        return True


def _has_traces(folder: Path) -> bool:
    """Whether a folder holds a file of a run (a lock file alone does not count)."""
    return any((folder / name).exists() for name in _TRACES)


def read_summary(folder: Path) -> dict[str, Any]:
    """A run's `summary.json`; empty when it is missing or cannot be read."""
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}


def new_folder(name: str) -> Path:
    """Create `runs/NAME/DATE-TIME`, unique even when two runs start in the same second."""
    stem = RUNS / name / time.strftime("%Y%m%d-%H%M%S")
    for attempt in range(1, 1000):
        folder = stem if attempt == 1 else stem.with_name(f"{stem.name}-{attempt}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(
                f"cannot create {folder}: {error.strerror}; set run.dir to a folder you can write"
            ) from None
        return folder
    raise UserError(f"cannot find a free name for the run folder {stem}; set run.dir")


def find_config(checkpoint: str, config: str | None) -> tuple[Path, Path]:
    """The weights' path and the config that goes with them: the one given, else that of the run they lie in.

    Raises UserError when the path does not exist, or no config is given and none is found.
    """
    path = Path(expand_path(checkpoint, "--checkpoint"))
    if not names_something(path):
        raise UserError(f"--checkpoint {path}: no such run, checkpoint or weights file{missing_path_hint(path)}")
    if config is not None:
        return path, Path(config)
    if (own := config_of_run(path)) is not None:
        return path, own
    raise UserError(f"--checkpoint {path}: does not lie in a run folder; give its config with --config FILE")


def config_of_run(path: Path) -> Path | None:
    """The config of the run that a run folder, a checkpoint or weights at `path` lie in; None outside of a run."""
    return next((folder / CONFIG for folder in _around(path) if (folder / CONFIG).is_file()), None)


def trained_classes(path: str | Path) -> list[str] | None:
    """The classes, in order, that the run, checkpoint or weights at `path` were trained on.

    Read from the checkpoint that they belong to, else from the run folder that they lie in; None where neither says.
    """
    real = Path(path).resolve()
    runs = [folder / CLASSES for folder in _around(real) if (folder / CONFIG).is_file()]
    for file in (real / PROGRESS_FILE, real.parent / PROGRESS_FILE, *runs):
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        classes = values.get("classes") if isinstance(values, dict) else values
        if isinstance(classes, list) and all(isinstance(name, str) for name in classes):
            return classes
    return None


def classes_to_keep(config: Config, snapshot: "Snapshot | None") -> list[str] | None:
    """The classes, in order, of the checkpoint to continue, else of the weights to start from; None: none are known."""
    if snapshot is not None:
        return list(snapshot.progress["classes"])
    return None if config.model.checkpoint is None else trained_classes(config.model.checkpoint)


def launcher_id() -> str | None:
    """Name of the torchrun that started this process, the same for every restart of its workers; None without one."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if run_id is None:
        return None
    return run_id if run_id != "none" else f"{socket.gethostname()}:{os.getppid()}"


def _around(path: Path) -> Sequence[Path]:
    """The folders that may be the run folder of a run, a checkpoint or a file in one."""
    return (path, *path.resolve().parents[:3])


def _run_of_this_launcher(config: Config, folder: Path | None) -> Path | None:
    """The run that earlier workers of this torchrun began, if this is one of its restarts."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:
        return None
    candidates = [folder] if folder is not None else _runs_named(config)
    return next((run for run in candidates if read_summary(run).get("launcher") == launcher_id()), None)


def _continue_restarted(folder: Path, resume: str) -> RunChoice:
    status = read_summary(folder).get("status")
    if status == "requeue":
        return RunChoice(folder, status=REQUEUE, message=f"{folder} was stopped by a signal and is not restarted here")
    if status == "done":
        return RunChoice(folder, status=0, message=f"{folder} is finished")
    if resume not in ("none", "auto") and not list_checkpoints(folder / CHECKPOINTS):
        return RunChoice(folder, checkpoint=Path(expand_path(resume, "--resume")))
    return _continue_or_begin(folder)


def _continue_or_begin(folder: Path) -> RunChoice:
    """Continue the run in a folder, or begin it again where it ended before its first save.

    Raises UserError where it has no checkpoint though it must have had one: its record would be lost for nothing.
    """
    saved = folder / CHECKPOINTS
    if not list_checkpoints(saved) and (sign := _sign_of_a_checkpoint(folder)):
        raise UserError(
            f"{folder}: {sign}, but there is no checkpoint in {saved}; put it back, give one that lies elsewhere with "
            "--resume PATH and another run.dir, or begin again with another run.dir"
        )
    return RunChoice(folder, checkpoint=folder, or_begin=True)


def _sign_of_a_checkpoint(folder: Path) -> str | None:
    """What shows that a run has saved or went on from a checkpoint; None for one that may have been killed before."""
    summary = read_summary(folder)
    step = summary.get("resumed_from")
    if summary.get("status") in ("done", "requeue"):
        return f"the run ended as {summary['status']}"
    if link := next((name for name in ("last", "best") if (folder / CHECKPOINTS / name).is_symlink()), None):
        return f"its link {link} is there"
    every = 0
    with suppress(OSError):  # who writes there will say so
        for row in read_rows(folder / METRICS):
            if row["event"] == "start":
                step = row.get("resumed_from") or step
                every = row.get("config", {}).get("run", {}).get("checkpoint_every", 0)
            elif row.get("epoch", 0) > 2 or 0 < 2 * every < row["step"]:
                return f"its record goes up to step {row['step']}, beyond two saves"  # a save waits for the one before
    return f"it went on from a checkpoint of step {step}" if step else None


def _choose_automatically(config: Config, folder: Path | None) -> RunChoice:
    if folder is not None:
        if not _has_traces(folder):
            return RunChoice(folder, new=True)
        if read_summary(folder).get("status") == "done" and (ended := _nothing_to_do(config, folder)):
            return RunChoice(folder, status=0, message=ended)
        return _continue_or_begin(folder)
    unfinished = [run for run in _runs_named(config) if read_summary(run).get("status") != "done"]
    unfinished.sort(key=holds_run, reverse=True)  # those without an update last
    return _continue_or_begin(unfinished[0]) if unfinished else RunChoice()


def _nothing_to_do(config: Config, folder: Path) -> str | None:
    """What to say of a finished run with nothing left to do; None if the schedule is longer than it was.

    Raises UserError when the schedule ends before the run does, or the config changes what must stay.
    """
    try:
        done = json.loads((folder / "checkpoints" / "last" / "progress.json").read_text(encoding="utf-8"))
        step, per_epoch = int(done["step"]), int(done["updates_per_epoch"])
    except (OSError, ValueError, TypeError, KeyError):
        return None  # reading the checkpoint will tell
    schedule = config.schedule
    refuse_fixed(changed_keys(done.get("config"), config))
    refuse_shorter(schedule, step, per_epoch)
    if total_updates(schedule, per_epoch) > step:
        if out_of_patience(config.run, done.get("history", ())):
            return f"{folder} is finished at step {step} by run.patience, {config.run.patience}; raise it to go on"
        return None
    limits = {"schedule.epochs": schedule.epochs * per_epoch, "schedule.steps": schedule.steps}
    keys = " and ".join(key for key, limit in limits.items() if limit == step)
    return f"{folder} is finished at step {step}, nothing to do; raise {keys} to go on"


def _choose_explicitly(path: Path, folder: Path | None) -> RunChoice:
    if not names_something(path):
        raise UserError(
            f"--resume {path}: no such run or checkpoint; give none, auto, a run folder or a checkpoint"
            + missing_path_hint(path)
        )
    real = path.resolve()
    if real.is_dir() and _has_traces(real):
        owner: Path | None = path
    elif real.parent.name == "checkpoints":
        owner = real.parent.parent
    else:
        owner = None
    if folder is None or (owner is not None and folder.resolve() == owner.resolve()):
        return RunChoice(owner, checkpoint=path)
    refuse_held(folder, path)
    return RunChoice(folder, checkpoint=path, new=True)


def _runs_named(config: Config) -> list[Path]:
    """Runs under `runs/NAME`, newest first."""
    parent = RUNS / str(config.run.name)
    if not parent.is_dir():
        return []
    return sorted((run for run in parent.iterdir() if run.is_dir() and _has_traces(run)), reverse=True)
