"""The operations' C++ sources: compiled for this machine once, kept on disk, called for a range of work per thread."""

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
_SCALARS = {torch.float32: ("float", 4), torch.float64: ("double", 8)}
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
    """Numbers per vector: 64 bytes, or 32 for rows that would leave half of them idle."""
    most = 64 // _SCALARS[dtype][1]
    return most // 2 if width <= most // 2 else most


@cache
def library(source: str, dtype: torch.dtype, **macros: int) -> ctypes.CDLL:
    """The library that `source` gives for a scalar type and these macros; compiled if this machine has none yet.

    Libraries lie in $ACMIX_CACHE, or in ~/.cache/acmix, which only the user may write to; the name carries a digest of
    everything that determines the content. Of processes that compile the same one, the last to finish replaces it. A
    file that a full disk or a power cut has damaged is compiled again: to load it would crash the process.

    Raises:
        RuntimeError: if there is no C++ compiler or it fails; the message holds its output.
        OSError: if the folder cannot be written or the library cannot be loaded.
    """
    compiler = cxx_compiler()
    if compiler is None:
        raise RuntimeError("there is no C++ compiler (install g++ or clang++, or set CXX)")
    defines = [f"-DT={_SCALARS[dtype][0]}", *(f"-D{name}={value}" for name, value in macros.items())]
    file = _SOURCES / source
    text = [file.read_text(), (_SOURCES / "maps.h").read_text()]
    recipe = "\0".join((*text, compiler, _version(compiler), _processor(), *_FLAGS, *defines))
    target = cache_folder() / f"{file.stem}-{hashlib.sha256(recipe.encode()).hexdigest()[:24]}.so"
    if not _is_intact(target):
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            built = Path(scratch) / target.name
            command = [compiler, *_FLAGS, *defines, f"-I{_SOURCES}", str(file), "-o", str(built)]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")
            _seal(built)
            built.replace(target)
    return ctypes.CDLL(str(target))


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
def refusal(
    source: str, device: torch.device, dtype: torch.dtype, kernel_size: int, heads: int | None = None
) -> str | None:
    """Why `source` cannot run on maps of this device and dtype; None once it is compiled, for rows of whole vectors.

    Args:
        source: file below this folder.
        kernel_size, heads: macros K and N of the source; heads is None for a source without N.
    """
    if device.type != "cpu":
        return f"it is written for the CPU, the tensors are on {device}"
    return _compiler_refusal(source, torch.promote_types(dtype, torch.float32), kernel_size, heads)


@cache
def _compiler_refusal(source: str, dtype: torch.dtype, kernel_size: int, heads: int | None) -> str | None:
    macros = {"K": kernel_size, "LANES": lanes(sys.maxsize, dtype)} | ({} if heads is None else {"N": heads})
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
    """Call `function(*arguments, begin, end)` for parts of range(count), one for each of PyTorch's threads."""
    threads = max(1, min(torch.get_num_threads(), count))
    bounds = [ctypes.c_int64(count * i // threads) for i in range(threads + 1)]
    if threads == 1:
        function(*arguments, *bounds)
        return
    pool = _pool(threads, os.getpid())
    for part in [pool.submit(function, *arguments, *span) for span in pairwise(bounds)]:
        part.result()
