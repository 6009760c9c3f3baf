"""Names the globals that a pickle would import. Only its opcodes are read: nothing is imported, called or built."""

import io
import pickletools
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO

_STRING_OPCODES = frozenset(
    {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
)
_GET_OPCODES = frozenset({"GET", "BINGET", "LONG_BINGET"})
_PUT_OPCODES = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
# A legacy torch file is a few pickles in a row, then raw storages; a hostile file may hold any number of pickles.
_MAX_PICKLES = 16
# A few thousand bytes of a hostile archive may stand for any number; the pickles of real weights fit in a few million.
_MAX_BYTES = 64 << 20
_MAX_OPCODES = 4_000_000
_MAX_GLOBALS = 1000
_MAX_NAME = 256
_READ_IN_PARTS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # zipfile inflates a block of another kind as a whole
_TORCH_TAR_PICKLES = ("sys_info", "pickle", "storages", "tensors")


def scan_globals(path: Path) -> list[str]:
    """Every global, as `module.name`, that the pickles in a .pt/.pth/.pkl/.tar file refer to, without repeats.

    Reads torch's zip format, its legacy formats (several pickles in a row, a tar) and bare pickles; of a damaged or
    very large file, as much as can be read in 64 MiB. Raises OSError when the file cannot be opened.
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
            left = _MAX_BYTES
            for item in archive.infolist():
                if item.filename.endswith((".pkl", ".pickle")) and item.compress_type in _READ_IN_PARTS:
                    with archive.open(item) as record:
                        data = record.read(left)
                    left -= len(data)
                    yield io.BytesIO(data)
        return
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, ValueError):
        pass  # not a zip archive, or a broken one: try the next format
    with path.open("rb") as file:
        start = io.BytesIO(file.read(_MAX_BYTES))
    try:
        with tarfile.open(fileobj=start, mode="r:") as archive_tar:
            for member in archive_tar:
                wanted = member.name in _TORCH_TAR_PICKLES and not member.issparse()
                stream = archive_tar.extractfile(member) if wanted else None
                if stream is not None:
                    yield io.BytesIO(stream.read())
        return
    except (tarfile.TarError, RecursionError):
        pass  # not a tar either, or headers of headers of headers: bare pickles
    start.seek(0)
    yield start


def _scan_one(stream: BinaryIO, found: dict[str, None]) -> bool:
    """Scan one pickle; True when it ended properly and another one may follow."""
    strings: list[str] = []
    memo: dict[int, str | None] = {}
    last: str | None = None
    try:
        for opcode, argument, _ in islice(pickletools.genops(stream), _MAX_OPCODES):
            if opcode.name in ("GLOBAL", "INST"):
                found[str(argument)[:_MAX_NAME].replace(" ", ".", 1)] = None
                last = None
            elif opcode.name == "STACK_GLOBAL":
                found[".".join(strings[-2:]) or "a computed global"] = None
                last = None
            elif opcode.name in ("EXT1", "EXT2", "EXT4"):
                found[f"copyreg extension {argument}"] = None
            elif opcode.name in _STRING_OPCODES:
                last = argument.decode("utf-8", "replace") if isinstance(argument, bytes) else str(argument)
                last = last[:_MAX_NAME]
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
            if len(found) >= _MAX_GLOBALS:
                return False
        return opcode.name == "STOP"
    except (ValueError, IndexError, KeyError, EOFError, UnicodeError, OverflowError, MemoryError):
        return False
