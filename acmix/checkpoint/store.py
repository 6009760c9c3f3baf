"""Checkpoints that are either complete or not there: saved in the background, checked before use, pruned.

Layout of a run folder's `checkpoints/`: `step_XXXXXXXX/` with model.safetensors, ema.safetensors (if any), training.pt,
progress.json and manifest.json, and the relative symbolic links `last` and `best`.
"""

import errno
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal, cast

import torch

from acmix.checkpoint.atomic import (
    crash_point,
    link_target,
    remove_folder,
    replace_link,
    sync_file,
    sync_folder,
)
from acmix.checkpoint.layout import ABANDONED, CHECKPOINTS, clean_leftovers, list_checkpoints, step_name, step_of
from acmix.checkpoint.manifest import (
    EMA_FILE,
    MANIFEST_NAME,
    MODEL_FILE,
    PROGRESS_FILE,
    TRAINING_FILE,
    FileRecord,
    HashingFile,
    render_manifest,
)
from acmix.checkpoint.read import SoundCheckpoint, newest_sound
from acmix.checkpoint.safetensors_writer import write_safetensors
from acmix.checkpoint.snapshot import Snapshot, SnapshotBuffers, state_bytes
from acmix.errors import UserError
from acmix.json_text import json_text

_WAYS_OUT = {
    errno.ENOSPC: "free some space or lower run.keep",
    errno.EDQUOT: "free some of the quota or lower run.keep",
    errno.EFBIG: "raise the process's file-size limit (ulimit -f)",
    errno.EACCES: "make the run folder writable",
    errno.EPERM: "make the run folder writable",
    errno.EROFS: "make the run folder writable",
}


class SaveError(UserError):
    """A checkpoint that could not be written; names the path, the bytes needed and free, and what is still intact."""


class CheckpointStore:
    """Saves, lists and prunes the checkpoints of one run; used by rank 0 only, under the run's lock.

    run_dir: the run folder. keep: number of newest checkpoints to keep, besides the targets of `last` and `best`.
    background: write in a thread while training goes on; at most one save is under way. on_error: after a failed save,
    `stop` raises SaveError at the next call of save, poll or wait; `continue` warns on stderr at once, and
    `settle` alone raises.
    """

    def __init__(self, run_dir: Path, keep: int, *, background: bool, on_error: Literal["stop", "continue"]) -> None:
        self.folder = Path(run_dir) / CHECKPOINTS
        self.keep = max(1, keep)
        self.background = background
        self.on_error = on_error
        self._buffers = SnapshotBuffers()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._passed_over: UserError | None = None  # of the last save, where training went on
        self._saves = 0
        with _as_user_error(self.folder):
            clean_leftovers(self.folder)

    def reserve(self, snapshot: Snapshot) -> None:
        """Allocate host memory for copies of snapshots like this one, in the background, to make the first save fast.

        Call it once, when the optimizer has its state (after the first update). Does nothing if background is off.
        """
        if self.background:
            self.wait()
            self._start(self._buffers.reserve(snapshot))

    def save(self, snapshot: Snapshot, *, best: bool) -> None:
        """Save a snapshot as `step_XXXXXXXX`, point `last` (and `best`) at it, and prune.

        Tensors are copied before this returns, so training may change them at once. Waits for a save still under way.
        Raises SaveError as on_error says, TypeError for a state that could not be loaded again.
        """
        self.wait()
        self._saves += 1
        progress = json_text(snapshot.progress).encode()
        copied = self._buffers.copy(snapshot)
        number = self._saves

        def work() -> None:
            self._write_and_note_errors(copied, progress, best, number)

        if self.background:
            self._start(work)
        else:
            work()
            self.poll()

    def wait(self) -> None:
        """Return once the save under way is on disk; raises SaveError as on_error says."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.poll()

    def fail(self, error: UserError) -> None:
        """Take a save for failed, as on_error says; for what has to be written before it, too."""
        if self.on_error == "continue":
            self._passed_over = error
            print(f"warning: {error}; training goes on and the next save tries again", file=sys.stderr, flush=True)
        else:
            self._error = error

    def settle(self) -> None:
        """As wait, when no other save follows: raises SaveError also where on_error is `continue`."""
        self.wait()
        if self._passed_over is not None:
            raise self._passed_over

    def poll(self) -> None:
        """Raise the error of a save that has failed; does not wait, so it is cheap enough for every step."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def newest(self) -> Path | None:
        """The folder of the checkpoint that read_newest returns; warnings and errors are the same."""
        newest = self.read_newest()
        return None if newest is None else newest.folder

    def read_newest(self) -> SoundCheckpoint | None:
        """The newest checkpoint whose files all agree with its manifest; warns on stderr of each newer, damaged one.

        None where there is no checkpoint at all. Raises UserError where there are some and none is sound: a run must
        not silently begin again.
        """
        newest = newest_sound(self.folder)
        if newest is None and list_checkpoints(self.folder):
            raise UserError(
                f"{self.folder}: none of its checkpoints is sound (see the warnings); begin again with another run.dir "
                f"or move {self.folder} away to begin again here"
            )
        return newest

    def holds(self, step: int) -> bool:
        """Whether there is a checkpoint of `step`, sound or not."""
        return any(number == step for number, _ in list_checkpoints(self.folder))

    def rewind(self, step: int, best: int | None = None) -> None:
        """Move checkpoints later than `step` to `checkpoints/abandoned/`: the run goes on from `step`.

        Nothing is deleted; `newest`, `last` and pruning no longer see them. Call it when a run resumes: if it is killed
        before its next save, the next resume must not pick up the abandoned checkpoints. `best` is the step of the best
        evaluation until then, None for none: the link is put right too.
        """
        with _as_user_error(self.folder):
            self._rewind(step, best)

    def _rewind(self, step: int, best: int | None = None) -> None:
        later = [(number, path) for number, path in list_checkpoints(self.folder) if number > step]
        shelf = self.folder / ABANDONED
        for later_step, path in sorted(later, reverse=True):
            shelf.mkdir(exist_ok=True)
            place, copy = shelf / step_name(later_step), 2
            while place.exists():
                place, copy = shelf / f"{step_name(later_step)}-{copy}", copy + 1
            os.rename(path, place)
            for link in ("last", "best"):
                if link_target(self.folder / link) == step_name(later_step):
                    (self.folder / link).unlink()
        # A kill between a save's rename and its links leaves these one checkpoint behind; here they catch up.
        for link, number in (("last", step), ("best", best)):
            name = None if number is None else step_name(number)
            if name and (self.folder / name).is_dir() and link_target(self.folder / link) != name:
                replace_link(self.folder / link, name)
                sync_folder(self.folder)

    def _start(self, work: Callable[[], None]) -> None:
        # Not a daemon thread: the interpreter waits for it at exit, so a save that has begun is finished.
        self._thread = threading.Thread(target=work, name="checkpoint-save")
        self._thread.start()

    def _write_and_note_errors(self, snapshot: Snapshot, progress: bytes, best: bool, number: int) -> None:
        self._passed_over = None
        try:
            self._write(snapshot, progress, best, number)
        except OSError as cause:
            error = self._save_error(snapshot, cause)
            error.__cause__ = cause
            self.fail(error)
        except Exception as defect:  # noqa: BLE001 - a thread cannot raise: poll() does, in the training loop
            self._error = defect

    def _write(self, snapshot: Snapshot, progress: bytes, best: bool, number: int) -> None:
        name = step_name(snapshot.step)
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True)
            sync_folder(self.folder.parent)
        crash_point("before_write", number)
        temporary = self.folder / f".tmp-{name}-{os.getpid()}"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            self._write_files(temporary, snapshot, progress, number)
            crash_point("before_sync", number)
            for path in temporary.iterdir():
                sync_file(path)
            sync_folder(temporary)
            crash_point("before_rename", number)
            self._put_in_place(temporary, self.folder / name, number)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        crash_point("after_rename", number)
        replace_link(self.folder / "last", name)
        if best:
            replace_link(self.folder / "best", name)
        self._rewind(snapshot.step)
        sync_folder(self.folder)
        self._prune(number)

    def _write_files(self, folder: Path, snapshot: Snapshot, progress: bytes, number: int) -> None:
        records: dict[str, FileRecord] = {}

        def write(name: str, content: Callable[[HashingFile], object], after_write: Callable[[], None] | None) -> None:
            with (folder / name).open("wb") as raw:
                file = HashingFile(raw, after_write)
                try:
                    content(file)
                except RuntimeError as error:
                    raise file.failure or error from None
            records[name] = file.record()

        # Only a drill needs the extra flush after each write that makes "mid_write" leave half a file behind.
        halfway = (lambda: crash_point("mid_write", number)) if "ACMIX_CRASH_AT" in os.environ else None
        write(MODEL_FILE, lambda file: write_safetensors(snapshot.model, file), None)
        ema = snapshot.ema
        if ema is not None:
            write(EMA_FILE, lambda file: write_safetensors(ema, file), None)
        write(TRAINING_FILE, lambda file: torch.save(snapshot.training, cast(BinaryIO, file)), halfway)
        write(PROGRESS_FILE, lambda file: file.write(progress), None)
        (folder / MANIFEST_NAME).write_bytes(render_manifest(snapshot.step, records))

    def _put_in_place(self, temporary: Path, final: Path, number: int) -> None:
        """Rename the complete folder to its final name, replacing an earlier save of the same step."""
        if not final.exists():
            os.rename(temporary, final)
            sync_folder(self.folder)
            return
        # A folder cannot be renamed over another. Until the new one is there, the old one counts as this step.
        old = self.folder / f".old-{final.name}-{os.getpid()}"
        os.rename(final, old)
        try:
            crash_point("mid_replace", number)
            os.rename(temporary, final)
        except OSError:
            os.rename(old, final)
            raise
        sync_folder(self.folder)
        shutil.rmtree(old, ignore_errors=True)

    def _prune(self, number: int) -> None:
        """Remove all but the newest `keep` checkpoints and the targets of the links; a failure here only warns."""
        protected = {link_target(self.folder / name) for name in ("last", "best")}
        steps = sorted(list_checkpoints(self.folder), reverse=True)
        for _, path in steps[self.keep :]:
            if path.name in protected or step_of(path.name) is None:
                continue
            try:
                remove_folder(path, lambda: crash_point("pruning", number))
            except OSError as error:
                print(f"warning: could not remove the old checkpoint {path}: {error.strerror}", file=sys.stderr)

    def _save_error(self, snapshot: Snapshot, cause: OSError) -> SaveError:
        path = self.folder / step_name(snapshot.step)
        needed = state_bytes(snapshot.model) + state_bytes(snapshot.ema) + state_bytes(snapshot.training)
        last = link_target(self.folder / "last")
        intact = f"the last checkpoint, {self.folder / last}, is intact" if last else "there is no earlier checkpoint"
        way_out = _WAYS_OUT.get(cause.errno or 0, "check the disk")
        return SaveError(
            f"could not save {path}: {cause.strerror or cause}: {needed:,} bytes needed, {_free_bytes(path)} free; "
            f"{intact}; {way_out}"
        )


@contextmanager
def _as_user_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot change {folder}: {error.strerror}; make the run folder writable") from error


def _free_bytes(path: Path) -> str:
    for folder in path.parents:
        if folder.is_dir():
            return f"{shutil.disk_usage(folder).free:,}"
    return "unknown"
