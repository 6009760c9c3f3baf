"""A run picked up again: which checkpoint it goes on from, and at what cost."""

import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from acmix.checkpoint.snapshot import Snapshot
from acmix.checkpoint.store import CheckpointStore
from acmix.config import Config, load_config
from acmix.engine.lock import RunLock
from acmix.engine.run_folder import RunChoice, choose_run
from acmix.engine.saver import Saver
from acmix.engine.session import Session
from acmix.errors import UserError
from acmix.process.distributed import Distributed

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
VALUES = 2**20


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Of a run whose checkpoints at steps 1 and 2 hold 4 MiB of weights each."""
    store = CheckpointStore(tmp_path, 2, background=False, on_error="stop")
    for step in (1, 2):
        store.save(Snapshot({"weight": torch.full((VALUES,), float(step))}, None, {}, {"step": step}), best=False)
    return load_config(QUICKSTART, [f"run.dir={tmp_path}", "run.device=cpu"])


def load(config: Config, resume: str) -> Snapshot | None:
    with Distributed.start(config.run) as dist, Session(choose_run(config, resume), config, dist) as session:
        return session.load()


def load_and_open(choice: RunChoice, config: Config) -> None:
    with Distributed.start(config.run) as dist, Session(choice, config, dist) as session:
        snapshot = session.load()
        session.open(["0", "1"], 0 if snapshot is None else snapshot.step)


def test_a_resume_points_best_at_the_checkpoint_that_a_killed_save_left_without_it(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 2, background=False, on_error="stop")
    for step in (1, 2):
        progress = {"step": step, "best": {"step": step}}
        store.save(Snapshot({"weight": torch.zeros(1)}, None, {}, progress), best=step == 1)
    config = load_config(QUICKSTART, [f"run.dir={tmp_path}", "run.device=cpu"])
    load_and_open(choose_run(config, "auto"), config)
    assert (store.folder / "best").resolve().name == "step_00000002"


def bytes_read() -> int:
    """Bytes that this process has read from files so far."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


@pytest.mark.parametrize("how", ["auto", "run folder"])
def test_a_resume_reads_every_byte_of_its_checkpoint_once(config: Config, how: str) -> None:
    before = bytes_read()
    snapshot = load(config, "auto" if how == "auto" else str(config.run.dir))
    read = bytes_read() - before
    assert snapshot is not None
    assert snapshot.step == 2
    assert snapshot.model["weight"].eq(2).all()
    assert 4 * VALUES <= read < 2 * 4 * VALUES


def test_a_resume_falls_back_to_the_newest_sound_checkpoint(
    config: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoints" / "step_00000002" / "training.pt").unlink()
    snapshot = load(config, "auto")
    assert snapshot is not None
    assert snapshot.step == 1
    assert capfd.readouterr().err.count("warning: checkpoint left out") == 1


@pytest.mark.parametrize(("resume", "part"), [("none", "a run"), ("auto", "a run"), ("given", "another run than")])
def test_a_folder_that_another_process_used_since_it_was_chosen_is_left_alone(
    resume: str, part: str, config: Config, tmp_path: Path
) -> None:
    given, folder = tmp_path, tmp_path / "new"
    config = load_config(QUICKSTART, [f"run.dir={folder}", "run.device=cpu"])
    choice = choose_run(config, str(given) if resume == "given" else resume)
    shutil.copytree(given / "checkpoints", folder / "checkpoints", symlinks=True)
    with RunLock(folder):
        pass
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError, match=rf"run\.dir: {folder} already holds {part}"):
        load_and_open(choice, config)
    assert sorted(folder.rglob("*")) == before


def test_workers_restarted_before_the_first_save_go_on_from_the_checkpoint_given(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, folder = tmp_path / "checkpoints" / "step_00000001", tmp_path / "new"
    folder.mkdir()
    (folder / "summary.json").write_text('{"status": "running", "launcher": "job", "resumed_from": 1}')
    config = load_config(QUICKSTART, [f"run.dir={folder}", "run.device=cpu"])
    with pytest.raises(UserError, match="it went on from a checkpoint of step 1"):
        choose_run(config, "auto")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    choice = choose_run(config, str(given))
    assert (choice.folder, choice.checkpoint, choice.or_begin) == (folder, given, False)
    with pytest.raises(UserError, match="it went on from a checkpoint of step 1"):
        choose_run(config, "auto")


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size`, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("on_save_error", ["continue", "stop"])
def test_a_log_that_a_full_disk_keeps_from_a_checkpoint_is_a_failed_save(on_save_error: str, tmp_path: Path) -> None:
    options = [f"run.dir={tmp_path / 'run'}", "run.device=cpu", f"run.on_save_error={on_save_error}"]
    config = load_config(QUICKSTART, options)
    with Distributed.start(config.run) as dist, Session(choose_run(config, "none"), config, dist) as session:
        session.load()
        session.open(["0", "1"], 0)
        saver = Saver(session, lambda: Snapshot({"weight": torch.zeros(1)}, None, {}, {"step": 1}))
        session.log.event("skip", {"step": 1, "padding": "x" * 100_000})  # more than what is printed here
        with files_limited_to(100_000):
            session.log.event("unread", {"step": 1})
            saver.save(best=False)
        assert (saver.problem is None) == (on_save_error == "continue")
        saver.settle()
        assert "metrics.jsonl: " in str(saver.problem), "unless another save follows"
        assert session.store.newest() is None
        saver.problem = None
        saver.save(best=False)
        saver.settle()
        assert saver.problem is None
        assert session.store.newest() is not None
