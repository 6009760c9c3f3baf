"""Names the globals that a pickle would import. Only its opcodes are read: nothing is imported, called or built."""

import io
import pickletools
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_STRING_OPCODES = frozenset(
    {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
)
_GET_OPCODES = frozenset({"GET", "BINGET", "LONG_BINGET"})
_PUT_OPCODES = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
# A legacy torch file is a few pickles in a row, then raw storages; a hostile file may hold any number of pickles.
_MAX_PICKLES = 16
_TORCH_TAR_PICKLES = ("sys_info", "pickle", "storages", "tensors")


def scan_globals(path: Path) -> list[str]:
    """Every global, as `module.name`, that the pickles in a .pt/.pth/.pkl/.tar file refer to, without repeats.

    Reads torch's zip format, its legacy formats (several pickles in a row, a tar) and bare pickles; of a damaged file,
    as much as can be read. Raises OSError when the file cannot be opened.
    """
    found: dict[str, None] = {}
    for stream in _pickle_streams(path):
        for _ in range(_MAX_PICKLES):
            if not _scan_one(stream, found):
                break
    return list(found)


def _pickle_streams(path: Path) -> Iterator[BinaryIO]:
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith((".pkl", ".pickle")) or name.endswith("data.pkl"):
                    yield io.BytesIO(archive.read(name))
        return
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError):
        pass  # not a zip archive, or a broken one: try the next format
    try:
        with tarfile.open(path, mode="r:") as archive_tar:
            for member in archive_tar:
                stream = archive_tar.extractfile(member) if member.name in _TORCH_TAR_PICKLES else None
                if stream is not None:
                    yield io.BytesIO(stream.read())
        return
    except tarfile.TarError:
        pass  # not a tar either: bare pickles
    with path.open("rb") as file:
        yield file


def _scan_one(stream: BinaryIO, found: dict[str, None]) -> bool:
    """Scan one pickle; True when it ended properly and another one may follow."""
    strings: list[str] = []
    memo: dict[int, str | None] = {}
    last: str | None = None
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name in ("GLOBAL", "INST"):
                found[str(argument).replace(" ", ".", 1)] = None
                last = None
            elif opcode.name == "STACK_GLOBAL":
                found[".".join(strings[-2:]) or "a computed global"] = None
                last = None
            elif opcode.name in ("EXT1", "EXT2", "EXT4"):
                found[f"copyreg extension {argument}"] = None
            elif opcode.name in _STRING_OPCODES:
                last = argument.decode("utf-8", "replace") if isinstance(argument, bytes) else str(argument)
                strings.append(last)
            elif opcode.name in _GET_OPCODES:
                last = memo.get(int(str(argument)))
                if last is not None:
                    strings.append(last)
            elif opcode.name in _PUT_OPCODES:
                memo[int(str(argument))] = last
            elif opcode.name == "MEMOIZE":
                memo[len(memo)] = last
            else:
                last = None
        return True
    except (ValueError, IndexError, KeyError, EOFError, UnicodeError, OverflowError, MemoryError):
        return False
