"""One attempt at a run: its lock, its folder on disk, its log and checkpoints, and the summary it leaves."""

import json
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from acmix.checkpoint.atomic import write_atomically
from acmix.checkpoint.grown import PROGRESS, new_parameters
from acmix.checkpoint.read import SoundCheckpoint, load_checkpoint, read_checkpoint
from acmix.checkpoint.snapshot import Snapshot
from acmix.checkpoint.store import CheckpointStore
from acmix.config import Config
from acmix.config.resume import Changes, changed_keys, refuse_fixed, settled, with_loader
from acmix.engine.lock import RunLock
from acmix.engine.run_folder import CLASSES, COMPILED, CONFIG, SUMMARY, RunChoice, launcher_id, new_folder, refuse_held
from acmix.errors import UserError
from acmix.json_text import json_text
from acmix.process.compiled import keep_compiled
from acmix.process.distributed import Distributed
from acmix.process.program import DONE, REQUEUE, ReportedElsewhere
from acmix.telemetry.loggers import need_packages
from acmix.telemetry.run_log import RunLog

STATUS_NAMES = {DONE: "done", REQUEUE: "requeue"}


class Session:
    """Creates the run folder only after model, data and checkpoint were built; leaves `summary.json` in it.

    The summary says how the attempt ended. Rank 0 alone writes to the disk, the others follow it. A context manager.
    """

    def __init__(self, choice: RunChoice, config: Config, dist: Distributed) -> None:
        self.choice = choice
        self.config = config
        self.dist = dist
        self.folder: Path | None = None
        self.changes: Changes = {}
        self.new: list[str] = []
        self._best: int | None = None  # step of the best evaluation before this attempt
        self._log: RunLog | None = None
        self._store: CheckpointStore | None = None
        self._held = ExitStack()
        self._open = False

    @property
    def log(self) -> RunLog:
        """The run's log, which writes on rank 0 only; available after `open`."""
        assert self._log is not None
        return self._log

    @property
    def store(self) -> CheckpointStore:
        """The run's checkpoints; on rank 0 only, available after `open`."""
        assert self._store is not None
        return self._store

    def load(self) -> Snapshot | None:
        """Lock the run to continue and read its checkpoint, once per rank; None for a run that begins.

        `changes` then holds what the config changes, and `config` the loader of that run where its own is auto; `new`
        holds the names of the parameters that were new when the run began from a grown network.
        Raises UserError when a logger is not installed, another process runs in the folder, the checkpoint asked for
        cannot be read, or the config changes what must stay.
        """
        self.dist.on_main(lambda: need_packages(self.config.run.loggers))
        found = self.dist.on_main(self._find_checkpoint)
        folder = self.dist.from_main(None if found is None else str(found.folder))
        if folder is None:
            start = self.config.model.checkpoint
            self.new = [] if start is None else new_parameters(start)
            return None
        snapshot = self.dist.all_or_none(lambda: load_checkpoint(Path(folder)) if found is None else found.snapshot())
        self.new = snapshot.progress.get(PROGRESS, [])
        self._best = (snapshot.progress.get("best") or {}).get("step")
        saved = snapshot.progress.get("config")
        self.config = settled(self.config, saved)
        self.changes = changed_keys(saved, self.config)
        self.dist.all_or_none(lambda: refuse_fixed(self.changes))
        return snapshot

    def settle(self, loader: str) -> Config:
        """The config of this run, once the data has decided what `data.loader: auto` is."""
        self.config = with_loader(self.config, loader)
        return self.config

    def open(self, classes: list[str], step: int) -> None:
        """Create the folder, or go on in it from `step`: config, classes, log and checkpoint store."""
        self.folder = Path(self.dist.from_main(self.dist.on_main(lambda: str(self._create(classes, step)))))
        if self.config.precision.compile:
            cache = self.config.precision.compile_cache
            keep_compiled(Path(cache) if cache else self.folder / COMPILED)
        self._log = self.dist.all_or_none(lambda: self._open_log(step))
        self._open = True

    def holds(self, step: int) -> bool:
        """Whether the run folder has a checkpoint of `step`; all ranks call it together."""
        return bool(self.dist.from_main(self.dist.is_main and self.store.holds(step)))

    def _open_log(self, step: int) -> RunLog:
        assert self.folder is not None
        loggers = self.config.run.loggers
        return RunLog(self.folder, enabled=self.dist.is_main, resume_step=step, loggers=loggers)

    def finish(self, status: int, outcome: dict[str, Any]) -> None:
        """Log the end of the attempt and write its summary."""
        name = STATUS_NAMES[status]
        self.log.end({"status": name, **outcome})
        self.summarise(name, **outcome)

    def summarise(self, status: str, **values: Any) -> None:
        """Write `summary.json`: status (running, done, requeue or failed) and `values`."""
        if self.dist.is_main and self.folder is not None:
            summary = {"status": status, "launcher": launcher_id(), **values}
            write_atomically(self.folder / SUMMARY, json_text(summary, indent=2) + "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._held, suppress(UserError):
            if self._log is not None:
                self._log.close()
            if error is not None and self._open and not isinstance(error, ReportedElsewhere):
                first = self.dist.watchdog.failure()  # of another rank: here only the connection to it is lost
                text = str(error) or type(error).__name__
                self.summarise("failed", error=text if first is None else f"rank {first.rank}: {first.message}")
            if self._store is not None:
                self._store.wait()  # finish a save that has begun, whatever else went wrong

    def _find_checkpoint(self) -> SoundCheckpoint | None:
        """The checkpoint to continue from; None for a run that begins, with `or_begin` also where there is none yet."""
        path = self.choice.checkpoint
        if path is None:
            return None
        if self.choice.folder is not None and self.choice.folder.is_dir():  # a new folder is created later, in `open`
            self._lock(self.choice.folder)
        return self._open_store(path).read_newest() if self.choice.or_begin else read_checkpoint(path)

    def _create(self, classes: list[str], step: int) -> Path:
        folder = self.choice.folder or new_folder(str(self.config.run.name))
        self._lock(folder)
        store = self._store or self._open_store(folder)
        store.rewind(step, self._best)
        self.folder = folder
        self.summarise("running", resumed_from=step or None)
        write_atomically(folder / CONFIG, self.config.dump())
        write_atomically(folder / CLASSES, json.dumps(classes, indent=1, ensure_ascii=False) + "\n")
        return folder

    def _lock(self, folder: Path) -> None:
        if self.folder is None:
            self._held.enter_context(RunLock(folder))
            if self.choice.new:  # another process may have used the folder since it was chosen
                refuse_held(folder, self.choice.checkpoint)
            self.folder = folder

    def _open_store(self, folder: Path) -> CheckpointStore:
        run = self.config.run
        self._store = CheckpointStore(folder, run.keep, background=run.background_save, on_error=run.on_save_error)
        return self._store
