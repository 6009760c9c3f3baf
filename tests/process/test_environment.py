"""What a run and a measurement say of the machine they were made on."""

import json
import os
import platform

import torch

from acmix.process.environment import describe_machine, describe_run


def test_a_machine_is_described_by_hardware_versions_and_date() -> None:
    machine = describe_machine()
    assert machine.processor
    assert machine.cores == os.cpu_count()
    assert machine.threads == torch.get_num_threads()
    assert (machine.gpu, machine.cuda) == (None, None)
    assert machine.versions["python"] == platform.python_version()
    assert torch.__version__.startswith(str(machine.versions["torch"]))
    assert machine.date.endswith(" UTC")


def test_a_run_starts_with_the_description_that_readers_of_the_log_expect() -> None:
    row = describe_run(torch.device("cpu"), processes=2)
    assert list(row) == ["versions", "git", "device", "processes", "threads", "host"]
    assert json.loads(json.dumps(row)) == row
    assert row["processes"] == 2
    assert row["device"] == f"cpu ({platform.machine()})"
