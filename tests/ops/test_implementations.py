"""The choice of an implementation: what auto takes, what is refused, and that it can say why."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from acmix.layers import ACmix
from acmix.ops import implementations, local_attention, native, shift_conv
from acmix.ops.implementations import Implementation, Operation, Problem, Window
from acmix.ops.local_attention.implementations import LOCAL_ATTENTION, cpp_macros
from acmix.ops.shift_conv.implementations import SHIFT_CONV

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PROBLEM = Problem(CPU, torch.float32, shape=(4, 64, 56, 56), heads=4, window=Window(7, 1, 1))
SMALL = replace(PROBLEM, shape=(4, 64, 14, 14))
needs_compiler = pytest.mark.skipif(native.cxx_compiler() is None, reason="needs a C++ compiler")


def test_auto_takes_the_first_that_can_run_and_is_not_declined() -> None:
    asked = []

    def refusal(problem: Problem) -> str:
        asked.append(problem)
        return "it is broken"

    operation = Operation(
        "op",
        Implementation("slow here", refusal=refusal, declines=lambda problem: "it is slow here"),
        Implementation("broken", refusal=refusal),
        Implementation("sound"),
        Implementation("last"),
    )
    assert operation.resolve("auto", PROBLEM) == "sound"
    assert len(asked) == 1, "what auto declines is not asked whether it can run"
    assert operation.resolve("last", PROBLEM) == "last"
    with pytest.raises(ValueError, match=r"impl 'broken' cannot run op for 4×64×56×56 float32 on cpu.*: it is broken"):
        operation.resolve("broken", PROBLEM)


def test_auto_takes_dense_for_small_maps_and_tiled_for_large_ones() -> None:
    assert LOCAL_ATTENTION.resolve("auto", SMALL) == "dense"
    assert LOCAL_ATTENTION.resolve("auto", PROBLEM) == "tiled"


@needs_compiler
def test_auto_takes_cpp_only_where_it_may_compile() -> None:
    assert LOCAL_ATTENTION.resolve("auto", replace(PROBLEM, may_compile=True)) == "cpp"
    assert LOCAL_ATTENTION.resolve("auto", replace(SMALL, may_compile=True)) == "cpp"
    assert LOCAL_ATTENTION.resolve("auto", SMALL) == "dense"
    window = replace(SMALL, shape=(4, 64, 7, 7), may_compile=True)
    assert LOCAL_ATTENTION.resolve("auto", window) == "dense"
    assert LOCAL_ATTENTION.resolve("auto", replace(window, channels_last=True)) == "cpp"
    convolution = replace(PROBLEM, window=Window(3, 1, 1))
    assert SHIFT_CONV.resolve("auto", replace(convolution, may_compile=True)) == "cpp"
    assert SHIFT_CONV.resolve("auto", convolution) == "folded"
    assert SHIFT_CONV.resolve("auto", replace(convolution, device=CUDA, may_compile=True)) == "folded"


def test_auto_takes_two_steps_for_many_heads_on_a_cpu() -> None:
    many = replace(PROBLEM, heads=8)
    assert SHIFT_CONV.resolve("auto", many) == "unfolded"
    assert SHIFT_CONV.resolve("auto", replace(many, heads=4)) == "folded"


def test_auto_takes_dense_products_for_some_heads_on_a_gpu_and_two_steps_for_many() -> None:
    """Without Triton, as it is here, up to four heads too are left to PyTorch."""
    chosen = {heads: SHIFT_CONV.resolve("auto", replace(PROBLEM, heads=heads, device=CUDA)) for heads in (4, 8, 16)}
    assert chosen == {4: "folded", 8: "dense", 16: "unfolded"}


@needs_compiler
def test_auto_takes_two_steps_for_more_heads_where_it_may_compile() -> None:
    many = replace(PROBLEM, heads=8, window=Window(3, 1, 1), may_compile=True)
    assert SHIFT_CONV.resolve("auto", many) == "cpp"
    assert SHIFT_CONV.resolve("auto", replace(many, heads=16)) == "unfolded"


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


def test_a_window_says_how_far_it_reaches_and_how_many_there_are() -> None:
    window = Window(kernel_size=5, stride=2, dilation=3)
    assert window.reach == 6
    assert window.out_size(9, 8) == (5, 4)
    assert window.out_size(9, 8) == tuple(torch.nn.functional.max_pool2d(torch.zeros(1, 9, 8), 5, 2, 2).shape[1:])


@needs_compiler
def test_former_names_of_implementations_still_work() -> None:
    q, weight = torch.randn(1, 8, 9, 9, generator=torch.Generator().manual_seed(0)), torch.ones(4, 2)
    for former, name in (("halo", "tiled"), ("compiled", "cpp")):
        assert torch.equal(local_attention(q, q, q, weight, 3, 1, former), local_attention(q, q, q, weight, 3, 1, name))
        exported = torch.ops.acmix.local_attention(q, q, q, weight, 3, 1, 1, former)[0]
        assert torch.equal(exported, local_attention(q, q, q, weight, 3, 1, name))
        assert ACmix(8, 8, impl=former).attention.impl == name
    fc, shift = torch.ones(9, 6), torch.ones(8, 9, 3, 3)
    former = shift_conv(q, q, q, fc, shift, impl="compiled")
    assert torch.equal(former, shift_conv(q, q, q, fc, shift, impl="cpp"))
    assert [ACmix(8, 8, impl=impl).convolution.impl for impl in ("compiled", "cpp", "halo")] == ["cpp", "cpp", "auto"]


def run_python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", **environment}
    root = Path(__file__).resolve().parents[2]
    return subprocess.run([sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True)


BOTH = """
import torch; from acmix.ops import local_attention, shift_conv
x = torch.zeros(1, 8, 30, 30); attention = x, x, x, torch.zeros(4, 2), 5
convolution = x, x, x, torch.zeros(9, 6), torch.zeros(8, 9, 3, 3)
local_attention(*attention); shift_conv(*convolution)
for call in (lambda: local_attention(*attention, impl='cpp'), lambda: shift_conv(*convolution, impl='cpp')):
    try: call()
    except ValueError as error: print(error)
"""


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "no-such-compiler", "HOME": "/nonexistent"}, "there is no C++ compiler (install g++"),
        ({"CXX": "false", "ACMIX_CACHE": "/dev/null/cache"}, "/dev/null/cache"),
    ],
    ids=["no compiler", "no cache folder"],
)
def test_a_machine_that_cannot_compile_does_without_and_says_why(environment: dict[str, str], reason: str) -> None:
    run = run_python(BOTH, ACMIX_DEBUG="1", ACMIX_COMPILE="always", **environment)
    assert run.returncode == 0, run.stderr
    attention, convolution = (line for line in run.stderr.splitlines() if line.startswith("acmix:"))
    assert ": tiled (" in attention
    assert ": folded (" in convolution
    assert all(reason in line for line in (attention, convolution))
    refusals = run.stdout.splitlines()
    assert [line.split(" for ")[0] for line in refusals] == [
        "impl 'cpp' cannot run local_attention",
        "impl 'cpp' cannot run shift_conv",
    ]
    assert all(reason in line for line in refusals)


def test_an_explicit_implementation_never_falls_back() -> None:
    with pytest.raises(ValueError, match=r"impl 'triton' cannot run .* the tensors are on cpu"):
        LOCAL_ATTENTION.resolve("triton", PROBLEM)
    for operation in (LOCAL_ATTENTION, SHIFT_CONV):
        with pytest.raises(ValueError, match=r"impl 'cpp' cannot run .* the tensors are on cuda"):
            operation.resolve("cpp", replace(PROBLEM, device=CUDA))
    with pytest.raises(ValueError, match=r"impl 'dense' cannot run .* bias for 65536 queries .* would take 16\.0 GiB"):
        LOCAL_ATTENTION.resolve("dense", replace(PROBLEM, shape=(1, 64, 256, 256)))
    assert LOCAL_ATTENTION.resolve("reference", PROBLEM) == "reference"


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
    assert "1600 keys are more than the 225 up to which it is faster than tiled" in lines[1]
    assert "ACMIX_COMPILE or torch.export keeps auto from compiling here" in lines[1]


def test_debug_prints_the_choice_for_the_convolution_path_once_per_shape() -> None:
    program = (
        "import torch; from acmix.ops import shift_conv as f; w, s = torch.zeros(9, 6), torch.zeros(8, 9, 3, 3)\n"
        "for size in (9, 9): x = torch.zeros(1, 8, size, size); f(x, x, x, w, s)"
    )
    run = run_python(program, ACMIX_DEBUG="1", ACMIX_COMPILE="traced")
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("acmix:")]
    assert line.startswith("acmix: shift_conv 1×8×9×9 float32 on cpu, head_dim 4, kernel_size 3, stride 1, dilation 1")
    assert ": folded (triton: the tensors are on cpu, not on CUDA; unfolded: it is the fastest only" in line
    assert "cpp: ACMIX_COMPILE or torch.export keeps auto from compiling here" in line


def test_debug_announces_a_compiled_graph_when_it_runs() -> None:
    program = (
        "import torch; from acmix.ops import local_attention\n"
        "f = torch.compile(lambda x: local_attention(x, x, x, torch.zeros(4, 2), 5), backend='eager', fullgraph=True)\n"
        "x = torch.zeros(1, 8, 9, 9); f(x); f(x)"
    )
    run = run_python(program, ACMIX_DEBUG="1", ACMIX_COMPILE="never")
    lines = [line for line in run.stderr.splitlines() if line.startswith("acmix:")]
    assert len(lines) == 1, run.stderr
    assert ": dense (triton: " in lines[0]


@needs_compiler
def test_a_failing_compiler_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ACMIX_CACHE", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"(?s)attention\.cpp .*failed:.*error"):
        native.library("local_attention/attention.cpp", torch.float32, LANES=16)  # K is missing
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "emptied", "flipped"])
def test_a_damaged_library_is_compiled_again(damage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ACMIX_CACHE", str(tmp_path))
    native.library.cache_clear()
    native.library("shift_conv/convolution.cpp", torch.float32, K=3, N=1, LANES=16)
    (file,) = tmp_path.glob("convolution*")  # beside it may lie what proves that one OpenMP runtime is shared
    whole = file.read_bytes()
    other = bytes([whole[5000] ^ 1])
    file.unlink()  # the process has the old one mapped: to write into it would crash it
    file.write_bytes({"cut": whole[:1000], "emptied": b"", "flipped": whole[:5000] + other + whole[5001:]}[damage])
    native.library.cache_clear()
    assert native.library("shift_conv/convolution.cpp", torch.float32, K=3, N=1, LANES=16).forward
    assert file.read_bytes() == whole
    native.library.cache_clear()


@needs_compiler
def test_the_order_of_macros_makes_no_second_library() -> None:
    macros = cpp_macros(torch.float32, 8, Window(7, 1, 1), 32)
    turned = dict(reversed(macros.items()))
    assert list(turned) != list(macros)
    source = "local_attention/attention.cpp"
    assert (
        native.library(source, torch.float32, **turned)._name == native.library(source, torch.float32, **macros)._name
    )
