"""Fixtures for every test: where a drill writes down what it tried and what survived."""

import json
import os
from collections.abc import Callable

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Write down a drill's count: `report(drill, promise, survived, tried)`.

    Appended as a JSON line to the file in ACMIX_DRILL_REPORT, if set; scripts/run_drills.py makes a table of it.
    """
    test = request.node.nodeid.partition("[")[0]

    def write(drill: str, promise: str, survived: int, tried: int) -> None:
        file = os.environ.get("ACMIX_DRILL_REPORT")
        if file:
            row = {"drill": drill, "promise": promise, "test": test, "survived": survived, "tried": tried}
            with open(file, "a") as report_file:
                report_file.write(json.dumps(row) + "\n")

    return write
