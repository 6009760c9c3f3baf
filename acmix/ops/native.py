"""The operations' C++ sources: compiled for this machine once, kept on disk, run on PyTorch's threads."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from acmix.paths import cache_folder

_SOURCES = Path(__file__).parent
# In C++, of what is computed with (T) and of what maps may hold (S).
_SCALARS = {torch.float32: ("float", 4), torch.float64: ("double", 8)}
_STORED = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "Bfloat16"}
# Bytes of a vector register.
_VECTOR_BYTES = {"AVX512": 64, "AVX2": 32}.get(torch.backends.cpu.get_cpu_capability(), 16)
# Contraction to fused multiply-adds is wanted; nothing here may assume that numbers are finite.
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=fast", "-fno-math-errno",
          "-fno-trapping-math")  # fmt: skip


@cache
def cxx_compiler() -> str | None:
    """Path of the C++ compiler, $CXX or else the first found, or None."""
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "c++"]
    return next((path for path in map(shutil.which, names) if path), None)


class Map(ctypes.Structure):
    """A map (images, channels, rows, columns) in memory: address and strides in elements."""

    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("image", "channel", "row", "column")))

    @classmethod
    def of(cls, maps: Tensor) -> "Map":
        return cls(maps.data_ptr(), *maps.stride())


def sizes(*numbers: int) -> ctypes.Array[ctypes.c_int64]:
    """The `Problem` of a source: its 64-bit integers in order."""
    return (ctypes.c_int64 * len(numbers))(*numbers)


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    """The address of a contiguous tensor's data."""
    return ctypes.c_void_p(tensor.data_ptr())


def lanes(width: int, dtype: torch.dtype) -> int:
    """Numbers per vector: a whole register, or half of one for rows that would leave the other half idle."""
    most = _VECTOR_BYTES // _SCALARS[dtype][1]
    return most // 2 if width <= most // 2 and _VECTOR_BYTES > 16 else most


def stored(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the libraries take maps of `dtype`: the same, or a wider one for which they must be copied."""
    return dtype if dtype in _STORED else torch.float32


@cache
def library(source: str, dtype: torch.dtype, **macros: int) -> ctypes.CDLL:
    """The library that `source` gives for maps of a dtype and these macros; compiled if this machine has none yet.

    It computes in float32 or better, on the threads of OpenMP where these are PyTorch's own.

    Libraries lie in $ACMIX_CACHE, or in ~/.cache/acmix, which only the user may write to; the name carries a digest of
    everything that determines the content. Of processes that compile the same one, the last to finish replaces it. A
    file that a full disk or a power cut has damaged is compiled again: to load it would crash the process.

    Raises:
        RuntimeError: if there is no C++ compiler or it fails; the message holds its output.
        OSError: if the folder cannot be written or the library cannot be loaded.
    """
    defines = [f"-DS={_STORED[dtype]}", f"-DT={_SCALARS[torch.promote_types(dtype, torch.float32)][0]}"]
    defines += [f"-D{name}={value}" for name, value in sorted(macros.items())]
    return _load(source, (*_FLAGS, *_openmp_flags(), *defines))


def _load(source: str, options: tuple[str, ...]) -> ctypes.CDLL:
    compiler = cxx_compiler()
    if compiler is None:
        raise RuntimeError("there is no C++ compiler (install g++ or clang++, or set CXX)")
    file = _SOURCES / source
    text = [part.read_text() for part in (file, *sorted(_SOURCES.glob("*.h")), *sorted(file.parent.glob("*.h")))]
    recipe = "\0".join((*text, compiler, _version(compiler), _processor(), *options))
    target = cache_folder() / f"{file.stem}-{hashlib.sha256(recipe.encode()).hexdigest()[:24]}.so"
    if not _is_intact(target):
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            built = Path(scratch) / target.name
            command = [compiler, *options, f"-I{_SOURCES}", str(file), "-o", str(built)]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")
            _seal(built)
            built.replace(target)
    return ctypes.CDLL(str(target))


@cache
def _openmp_flags() -> tuple[str, ...]:
    """What makes the compiler use OpenMP, if that means the runtime that PyTorch has loaded; else nothing.

    Threads of a second runtime would compete with PyTorch's, which go on spinning for a while after each of its
    operations. Whether it is the same is proved: by the address of one of its functions.
    """
    if not torch.backends.openmp.is_available():
        return ()
    try:
        ours = _load("openmp.cpp", (*_FLAGS, "-fopenmp")).runtime
        ours.restype = ctypes.c_void_p
        theirs = ctypes.CDLL(str(_library_of_torch())).omp_get_max_threads
    except (RuntimeError, OSError, AttributeError):  # no compiler, no OpenMP, or PyTorch's is hidden inside
        return ()
    return ("-fopenmp",) if ours() == ctypes.cast(theirs, ctypes.c_void_p).value else ()


def _library_of_torch() -> Path:
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    return Path(torch.__file__).parent / "lib" / f"libtorch_cpu{suffix}"


def _seal(library: Path) -> None:
    """Append a digest of the file to it, which loaders do not mind, and force both to the disk."""
    digest = hashlib.sha256(library.read_bytes()).digest()
    with library.open("ab") as file:
        file.write(digest)
        file.flush()
        os.fsync(file.fileno())


def _is_intact(library: Path) -> bool:
    """Whether a file is there and ends in the digest of the rest."""
    if not library.is_file():
        return False
    content = library.read_bytes()
    size = hashlib.sha256().digest_size
    return hashlib.sha256(content[:-size]).digest() == content[-size:]


@torch.compiler.assume_constant_result
def refusal(source: str, device: torch.device, dtype: torch.dtype, **macros: int) -> str | None:
    """Why `source` cannot run on maps of this device and dtype; None once it is compiled with these macros.

    Args:
        source: file below this folder.
        macros: LANES may be left out, for rows of whole vectors.
    """
    if device.type != "cpu":
        return f"it is written for the CPU, the tensors are on {device}"
    return _compiler_refusal(source, stored(dtype), **macros)


@cache
def _compiler_refusal(source: str, dtype: torch.dtype, **macros: int) -> str | None:
    macros = {"LANES": lanes(sys.maxsize, torch.promote_types(dtype, torch.float32))} | macros
    try:
        library(source, dtype, **macros)
    except (RuntimeError, OSError) as error:
        return str(error)
    return None


@cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout


@cache
def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by machines of different kinds."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return " ".join((*os.uname()[4:], torch.backends.cpu.get_cpu_capability(), features))


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """The threads of this process; a forked one gets its own."""
    return ThreadPoolExecutor(threads, thread_name_prefix="acmix")


def run(function: Callable[..., Any], arguments: list[Any], count: int) -> None:
    """Do `count` independent pieces of work on as many threads as PyTorch has.

    Calls `function(*arguments, begin, end, threads)`: once for the whole range where the library shares PyTorch's
    threads; else for a part of it and one thread, on each thread of a pool.
    """
    threads = max(1, min(torch.get_num_threads(), count))
    if threads == 1 or _openmp_flags():
        function(*arguments, *map(ctypes.c_int64, (0, count, threads)))
        return
    bounds = [ctypes.c_int64(count * i // threads) for i in range(threads + 1)]
    pool = _pool(threads, os.getpid())
    for part in [pool.submit(function, *arguments, *span, ctypes.c_int64(1)) for span in pairwise(bounds)]:
        part.result()
