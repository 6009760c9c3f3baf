"""The choice of an implementation: what auto takes, what is refused, and that it can say why."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from acmix.ops import dispatch
from acmix.ops.cpu import native

PROBLEM = dispatch.Problem(
    device="cpu",
    dtype=torch.float32,
    shape=(4, 64, 56, 56),
    head_dim=16,
    kernel_size=7,
    stride=1,
    dilation=1,
    triton_refusal="the tensors are on cpu",
)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "cxx_compiler", lambda: None)
    monkeypatch.setattr(native, "cxx_compiler", lambda: None)


def test_auto_takes_triton_whenever_it_can_run() -> None:
    for shape in ((4, 64, 56, 56), (4, 64, 7, 7)):
        problem = replace(PROBLEM, device="cuda", shape=shape, triton_refusal=None)
        assert dispatch.resolve("auto", problem) == "triton"


def test_auto_takes_dense_for_small_maps_and_halo_for_large_ones() -> None:
    assert dispatch.resolve("auto", replace(PROBLEM, shape=(4, 64, 14, 14))) == "dense"
    assert dispatch.resolve("auto", PROBLEM) == "halo"


def test_auto_takes_compiled_only_while_torch_compile_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "cxx_compiler", lambda: "/usr/bin/c++")
    assert dispatch.resolve("auto", replace(PROBLEM, tracing=True)) == "compiled"
    assert dispatch.resolve("auto", PROBLEM) == "halo"
    assert dispatch.resolve_shift_conv("auto", "cpu", tracing=True) == "compiled"
    assert dispatch.resolve_shift_conv("auto", "cpu", tracing=False) == "folded"
    assert dispatch.resolve_shift_conv("auto", "cuda", tracing=True) == "folded"


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_auto_does_without_and_compiled_says_what_to_install() -> None:
    assert dispatch.resolve("auto", replace(PROBLEM, tracing=True)) == "halo"
    assert dispatch.resolve_shift_conv("auto", "cpu", tracing=True) == "folded"
    with pytest.raises(ValueError, match=r"impl 'compiled' cannot run.*no C\+\+ compiler \(install g\+\+"):
        dispatch.resolve("compiled", PROBLEM)
    with pytest.raises(ValueError, match=r"impl 'compiled' cannot run.*no C\+\+ compiler \(install g\+\+"):
        dispatch.resolve_shift_conv("compiled", "cpu", tracing=False)
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler found"):
        native.library("attention.cpp", torch.float32, K=99, LANES=16)


def test_an_explicit_implementation_never_falls_back() -> None:
    with pytest.raises(ValueError, match=r"impl 'triton' cannot run .* the tensors are on cpu"):
        dispatch.resolve("triton", PROBLEM)
    with pytest.raises(ValueError, match=r"impl 'compiled' cannot run .* the tensors are on cuda"):
        dispatch.resolve("compiled", replace(PROBLEM, device="cuda"))
    with pytest.raises(ValueError, match=r"impl 'dense' cannot run .* bias for 65536 queries .* would take 16\.0 GiB"):
        dispatch.resolve("dense", replace(PROBLEM, shape=(1, 64, 256, 256)))
    assert dispatch.resolve("reference", PROBLEM) == "reference"


def test_debug_prints_the_choice_and_the_reasons_once_per_shape() -> None:
    program = (
        "import torch; from acmix.ops import local_attention as f; w = torch.zeros(4, 2)\n"
        "for size in (9, 9, 40, 9): x = torch.zeros(1, 8, size, size); f(x, x, x, w, 5)"
    )
    environment = {"ACMIX_DEBUG": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run([sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True)
    lines = [line for line in run.stderr.splitlines() if line.startswith("acmix:")]
    assert len(lines) == 2, run.stderr
    assert "1×8×9×9" in lines[0]
    assert ": dense (triton: " in lines[0]
    assert "1600 keys are more than the 225 up to which it is faster than halo" in lines[1]
    assert "auto takes it only inside torch.compile" in lines[1]


@pytest.mark.skipif(dispatch.cxx_compiler() is None, reason="needs a C++ compiler")
def test_a_failing_compiler_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ACMIX_CACHE", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"(?s)attention\.cpp .*failed:.*error"):
        native.library("attention.cpp", torch.float32, LANES=16)  # K is missing
    assert list(tmp_path.iterdir()) == []
