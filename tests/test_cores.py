"""How many cores a process may use, and who uses them: loader processes and torch's threads."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from acmix import cores
from acmix.config import Config, RunConfig
from acmix.data.advice import advice_on_waiting
from acmix.data.workers import worker_count
from acmix.process.environment import set_up_torch


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Sixteen cores and no quota, shared by four processes; the file that may hold a quota."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(cores, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    before = torch.get_num_threads()
    yield tmp_path / "cpu.max"
    torch.set_num_threads(before)


def config(workers: int | str = "auto") -> Config:
    data = {"dataset": "digits", "num_workers": workers}
    sections = {"model": {"name": "none"}, "data": data, "schedule": {"epochs": 1}, "run": {"device": "cpu"}}
    return Config.model_validate(sections)


def test_the_processes_of_a_machine_share_its_cores(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (cores.usable_cores(), cores.cores_per_process()) == (16, 4)
    machine.write_text("max 100000\n")
    assert cores.usable_cores() == 16
    machine.write_text("250000 100000\n")
    assert (cores.usable_cores(), cores.cores_per_process()) == (2, 1)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert cores.cores_per_process() == 2


def test_loader_processes_leave_cores_to_the_training_process(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (worker_count(config()), worker_count(config(7)), worker_count(config(0))) == (2, 7, 0)
    monkeypatch.setattr("acmix.data.workers.on_gpu", lambda _: True)
    assert worker_count(config()) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert worker_count(config()) == 1


def test_torch_takes_no_more_threads_than_the_process_has_cores(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for asked, omp, expected in ((None, None, 4), (3, None, 3), (None, "8", 8)):
        torch.set_num_threads(8)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if omp is not None:
            monkeypatch.setenv("OMP_NUM_THREADS", omp)
        set_up_torch(RunConfig(threads=asked), torch.device("cpu"))
        assert torch.get_num_threads() == expected


def test_an_epoch_that_waits_ends_with_what_to_change(machine: Path) -> None:
    assert advice_on_waiting(0.1, 3, config(), "workers") == []
    [more] = advice_on_waiting(0.34, 3, config(), "workers")
    assert more == (
        "Epoch 3 waited for data 34% of its time: raise data.num_workers (2 now; this process may use 4 cores)"
    )
    [smaller] = advice_on_waiting(0.34, 3, config(8), "workers")
    assert "store the images smaller" in smaller
    [moved] = advice_on_waiting(0.34, 3, config(), "resident")
    assert "data.loader=workers" in moved
