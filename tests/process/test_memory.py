"""Training steps on a CPU find the memory of the step before."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is glibc's")

STEPS = """
import resource
import torch
from acmix.config import RunConfig
from acmix.process.environment import set_up_torch
set_up_torch(RunConfig(dir="run"), torch.device("cpu"))
def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    maps = [torch.ones(1 << 20, 4 + i) for i in range(4)]  # 16 to 28 MiB each
    del maps
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first, *_, last = [step() for _ in range(10)]  # the heap grows a little more in the first four
print(first, last)
"""


def page_faults(**environment: str) -> tuple[int, int]:
    """Those of the first step of a process that allocates 88 MiB in each, and those of its last."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")} | environment
    done = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, env=env, check=True)
    first, last = map(int, done.stdout.split())
    return first, last


def test_later_steps_ask_the_system_for_no_memory() -> None:
    first, last = page_faults()
    assert last < first / 100


def test_an_allocator_that_the_environment_configures_is_left_alone() -> None:
    first, last = page_faults(MALLOC_TRIM_THRESHOLD_="131072")
    assert last > first / 10
