"""The choice of an implementation: what auto takes, what is refused, and that it can say why."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from acmix.ops import implementations, native

PROBLEM = implementations.Problem(
    device="cpu",
    dtype=torch.float32,
    shape=(4, 64, 56, 56),
    head_dim=16,
    kernel_size=7,
    stride=1,
    dilation=1,
    triton_refusal="the tensors are on cpu",
)


NO_COMPILER = "there is no C++ compiler (install g++ or clang++, or set CXX)"


def test_auto_takes_triton_whenever_it_can_run() -> None:
    for shape in ((4, 64, 56, 56), (4, 64, 7, 7)):
        problem = replace(PROBLEM, device="cuda", shape=shape, triton_refusal=None)
        assert implementations.resolve("auto", problem) == "triton"


def test_auto_takes_dense_for_small_maps_and_halo_for_large_ones() -> None:
    assert implementations.resolve("auto", replace(PROBLEM, shape=(4, 64, 14, 14))) == "dense"
    assert implementations.resolve("auto", PROBLEM) == "halo"


def test_auto_takes_compiled_only_where_it_may_compile() -> None:
    assert implementations.resolve("auto", replace(PROBLEM, may_compile=True)) == "compiled"
    assert implementations.resolve("auto", replace(PROBLEM, may_compile=True, shape=(4, 64, 14, 14))) == "dense"
    assert implementations.resolve("auto", PROBLEM) == "halo"
    assert implementations.resolve_shift_conv("auto", "cpu", may_compile=True) == "compiled"
    assert implementations.resolve_shift_conv("auto", "cpu", may_compile=False) == "folded"
    assert implementations.resolve_shift_conv("auto", "cuda", may_compile=True) == "folded"


def test_the_environment_says_where_auto_may_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def traced(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if implementations.may_compile() else x

    zero = torch.zeros(())
    for setting, eager, inside in (("never", False, 0), ("traced", False, 1), ("always", True, 1)):
        torch.compiler.reset()
        monkeypatch.setenv("ACMIX_COMPILE", setting)
        assert implementations.may_compile() is eager
        assert traced(zero) == inside
    monkeypatch.setenv("ACMIX_COMPILE", "sometimes")
    with pytest.raises(ValueError, match="ACMIX_COMPILE is 'sometimes': choose never, traced or always"):
        implementations.may_compile()


def test_without_a_compiler_auto_does_without_and_compiled_says_what_to_install() -> None:
    assert implementations.resolve("auto", replace(PROBLEM, may_compile=True, compiled_refusal=NO_COMPILER)) == "halo"
    assert implementations.resolve_shift_conv("auto", "cpu", True, NO_COMPILER) == "folded"
    with pytest.raises(ValueError, match=r"impl 'compiled' cannot run.*no C\+\+ compiler \(install g\+\+"):
        implementations.resolve("compiled", replace(PROBLEM, compiled_refusal=NO_COMPILER))
    with pytest.raises(ValueError, match=r"impl 'compiled' cannot run.*no C\+\+ compiler \(install g\+\+"):
        implementations.resolve_shift_conv("compiled", "cpu", False, NO_COMPILER)


def run_python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", **environment}
    root = Path(__file__).resolve().parents[2]
    return subprocess.run([sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True)


ONE_CALL = "import torch; from acmix.ops import local_attention as f; x = torch.zeros(1, 8, 30, 30)\n"


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "no-such-compiler", "HOME": "/nonexistent"}, "there is no C++ compiler (install g++"),
        ({"CXX": "false", "ACMIX_CACHE": "/dev/null/cache"}, "/dev/null/cache"),
    ],
    ids=["no compiler", "no cache folder"],
)
def test_a_machine_that_cannot_compile_falls_to_halo_and_says_why(environment: dict[str, str], reason: str) -> None:
    program = ONE_CALL + "f(x, x, x, torch.zeros(4, 2), 5)"
    run = run_python(program, ACMIX_DEBUG="1", ACMIX_COMPILE="always", **environment)
    assert run.returncode == 0, run.stderr
    assert ": halo (" in run.stderr
    run = run_python(program.replace("5)", "5, impl='compiled')"), **environment)
    assert run.returncode == 1
    assert reason in run.stderr


def test_an_explicit_implementation_never_falls_back() -> None:
    with pytest.raises(ValueError, match=r"impl 'triton' cannot run .* the tensors are on cpu"):
        implementations.resolve("triton", PROBLEM)
    with pytest.raises(ValueError, match=r"impl 'compiled' cannot run .* the tensors are on cuda"):
        implementations.resolve("compiled", replace(PROBLEM, device="cuda"))
    with pytest.raises(ValueError, match=r"impl 'dense' cannot run .* bias for 65536 queries .* would take 16\.0 GiB"):
        implementations.resolve("dense", replace(PROBLEM, shape=(1, 64, 256, 256)))
    assert implementations.resolve("reference", PROBLEM) == "reference"


def test_debug_prints_the_choice_and_the_reasons_once_per_shape() -> None:
    program = (
        "import torch; from acmix.ops import local_attention as f; w = torch.zeros(4, 2)\n"
        "for size in (9, 9, 40, 9): x = torch.zeros(1, 8, size, size); f(x, x, x, w, 5)"
    )
    run = run_python(program, ACMIX_DEBUG="1", ACMIX_COMPILE="traced")
    lines = [line for line in run.stderr.splitlines() if line.startswith("acmix:")]
    assert len(lines) == 2, run.stderr
    assert "1×8×9×9" in lines[0]
    assert ": dense (triton: " in lines[0]
    assert "1600 keys are more than the 225 up to which it is faster than halo" in lines[1]
    assert "ACMIX_COMPILE or torch.export keeps auto from compiling here" in lines[1]


def test_debug_prints_the_choice_for_the_convolution_path_once_per_shape() -> None:
    program = (
        "import torch; from acmix.ops import shift_conv as f; w, s = torch.zeros(9, 6), torch.zeros(8, 9, 3, 3)\n"
        "for size in (9, 9): x = torch.zeros(1, 8, size, size); f(x, x, x, w, s)"
    )
    run = run_python(program, ACMIX_DEBUG="1", ACMIX_COMPILE="traced")
    lines = [line for line in run.stderr.splitlines() if line.startswith("acmix:")]
    expected = "acmix: shift_conv 1×8×9×9 on cpu: folded (compiled: auto takes it only where it may compile)"
    assert lines == [expected], run.stderr


@pytest.mark.skipif(implementations.cxx_compiler() is None, reason="needs a C++ compiler")
def test_a_failing_compiler_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ACMIX_CACHE", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"(?s)attention\.cpp .*failed:.*error"):
        native.library("local_attention/attention.cpp", torch.float32, LANES=16)  # K is missing
    assert list(tmp_path.iterdir()) == []
