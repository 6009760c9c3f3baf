"""The C++ implementations on several threads."""

from pathlib import Path

import pytest
import torch

from acmix.ops import native
from acmix.testing import AttentionCase, ShiftConvCase

pytestmark = pytest.mark.skipif(native.cxx_compiler() is None, reason="needs a C++ compiler")

CASES = [
    AttentionCase(heads=3, head_dim=5, height=9, width=8, kernel_size=3, stride=2, batch=3),
    ShiftConvCase(heads=3, head_dim=5, height=9, width=8, stride=2, batch=3),
]


def on_threads(count: int, case: AttentionCase | ShiftConvCase) -> list[torch.Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return case.run(case.inputs(), "cpp")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["pytorchs-threads", "own-threads"])
def test_the_number_of_threads_changes_no_bit(case, shared, monkeypatch):
    if not shared:  # as with a compiler whose OpenMP is not PyTorch's
        monkeypatch.setattr(native, "_openmp_flags", lambda: ())
        native.library.cache_clear()
    one, several = on_threads(1, case), on_threads(3, case)
    native.library.cache_clear()
    torch.testing.assert_close(several, one, rtol=0, atol=0)


def openmp_runtimes() -> set[str]:
    files = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    return {file for file in files if Path(file).name.startswith(("libgomp", "libomp", "libiomp"))}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of loaded libraries")
def test_no_second_openmp_runtime_is_loaded_for_the_operations():
    torch.zeros(10**6).add(1)  # PyTorch's own is there from its first threads on
    before = openmp_runtimes()
    for case in CASES:
        on_threads(2, case)
    assert openmp_runtimes() == before
