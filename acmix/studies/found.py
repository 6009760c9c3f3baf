"""What lies in the folder of a run already: nothing, a run that can go on, a finished one, or another run."""

from pathlib import Path
from typing import Literal

from acmix.config.resume import Changes, changed_keys, shown
from acmix.config.yaml import read_yaml
from acmix.engine.run_folder import CONFIG, METRICS, holds_run
from acmix.errors import UserError
from acmix.studies.plan import Run
from acmix.telemetry.record import read_rows

State = Literal["new", "begun", "done"]

WITHOUT_EFFECT = frozenset(
    {
        "data.cache_dir", "data.cache_size", "data.download", "data.num_workers", "data.pin_memory",
        "data.prefetch_factor", "data.val_batch_size", "paths.every", "precision.compile_cache",
        "precision.grad_checkpointing", "run.background_save", "run.checkpoint_every", "run.device", "run.dir",
        "run.keep", "run.log_every", "run.loggers", "run.name", "run.on_save_error", "run.probes", "run.threads",
        "run.timeout",
    }
)  # fmt: skip
"""Keys that say where, how fast and how talkative a run is, not what it trains: runs that differ in them alone are one.

Fewer than those a resume may change: that allows another learning rate, which would make the run one of another arm.
"""


def state_of(run: Run) -> State:
    """How far the run in its folder is. Raises UserError, with the keys that differ, where it is not this one."""
    if not (run.folder / CONFIG).is_file() or not holds_run(run.folder):
        return "new"
    state: State = "done" if is_finished(run.folder) else "begun"
    if changes := _differences(run):
        told = ", ".join(
            f"{key} is {shown(old)} there, {shown(new)} in the study" for key, (old, new) in changes.items()
        )
        kind = "a finished run" if state == "done" else "a run"
        raise UserError(f"{run.folder} holds {kind} of another config: {told}; move it away, or choose another --out")
    return state


def is_finished(folder: Path) -> bool:
    """Whether the run in `folder` came to the end of its schedule."""
    ends = [row for row in read_rows(folder / METRICS) if row["event"] == "end"]
    return bool(ends) and ends[-1].get("status") == "done"


def _differences(run: Run) -> Changes:
    file = run.folder / CONFIG
    try:
        saved = read_yaml(file.read_text(encoding="utf-8"), str(file)).values
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    if not isinstance(saved, dict):
        raise UserError(f"{file}: is not the config of a run; move {run.folder} away, or choose another --out")
    return {key: pair for key, pair in changed_keys(saved, run.config).items() if key not in WITHOUT_EFFECT}
