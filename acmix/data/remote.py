"""Prepared shards on a web server: fetched when first needed, verified, and kept in a cache of bounded size."""

import fcntl
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from acmix.config import DataConfig
from acmix.data.images import BadImage
from acmix.data.shards import MANIFEST, Manifest, PreparedSource, ShardFile, Split, find_split, sha256_of
from acmix.errors import UserError
from acmix.paths import cache_folder

ATTEMPTS = 7
"""Tries without any progress before a transfer is given up."""

FIRST_WAIT = 1.0
"""Seconds before the second try; each further wait is twice as long: a minute in all."""

_TIMEOUT = 30.0
_BLOCK = 1 << 20
_MANIFEST_LIMIT = 1 << 28
_GONE = (401, 403, 404, 410)
_TOUCH_SECONDS = 60.0
_REST_SECONDS = 60.0


class FetchError(Exception):
    """A file that could not be had from its server; the message names its address and the reason."""


def is_address(root: str | None) -> bool:
    """Whether `data.root` is on a web server."""
    return root is not None and root.lower().startswith(("http://", "https://"))


def open_remote(data: DataConfig, split: str) -> PreparedSource:
    """A split of the prepared shards at the address `data.root`. Raises UserError."""
    assert data.root is not None
    address = data.root.rstrip("/")
    where = f"{address}/{MANIFEST}"
    try:
        text = _download(where)
    except FetchError as error:
        raise UserError(f"{error}; data.root is to be the address of shards of scripts/prepare_data.py") from None
    manifest = Manifest.from_json(text, where)
    if manifest is None:
        raise UserError(f"{where}: not of scripts/prepare_data.py; only its shards are read from a server")
    chosen = find_split(manifest, split, where)
    folder = cache_folder() / "shards" if data.cache_dir is None else Path(data.cache_dir).expanduser()
    cache = Cache(folder, None if data.cache_size is None else int(data.cache_size * 1e9))
    cache.prepare(chosen)
    return PreparedSource(Server(address, cache), manifest, chosen)


@dataclass(frozen=True)
class Cache:
    """Files under the name of their checksum, so that a file that changed on the server is another file here.

    limit: bytes of all files; None: no limit
    """

    folder: Path
    limit: int | None = None

    def path(self, file: ShardFile) -> Path:
        """Where a file lies once it is whole."""
        return self.folder / f"{file.sha256[:32]}-{file.name}"

    def prepare(self, split: Split) -> None:
        """Make the folder. Raises UserError where it cannot be written, or a whole split does not fit.

        An epoch reads every shard in between, so a cache that holds a part of them would fetch them again and again.
        """
        needed = split.bytes + split.index.bytes
        if self.limit is not None and needed > self.limit:
            raise UserError(
                f"data.cache_size: {self.limit / 1e9:g} GB are too few: {split.name} has {needed / 1e9:.3g}, "
                "and its images are read in any order; raise it, or copy the shards to this machine"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.locked(".cache.lock"):
                pass
        except OSError as error:
            raise UserError(f"data.cache_dir: {self.folder}: cannot be written: {error.strerror}") from None

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Hold a lock that the kernel drops when the process ends, however that ends."""
        with open(self.folder / name, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def make_room(self, size: int) -> None:
        """Remove the files used least recently, until one of `size` fits as well."""
        if self.limit is None:
            return
        with self.locked(".cache.lock"):
            files = [(entry.stat(), entry.path) for entry in os.scandir(self.folder) if not entry.name.startswith(".")]
            total = size + sum(status.st_size for status, _ in files)
            for status, path in sorted(files, key=lambda file: file[0].st_mtime):
                if total <= self.limit:
                    return
                with suppress(FileNotFoundError):
                    os.unlink(path)
                total -= status.st_size


@dataclass
class Server:
    """A set of shards at an address, with a cache before it."""

    address: str
    cache: Cache
    _used: dict[str, float] = field(default_factory=dict)
    _failed: dict[str, tuple[float, str]] = field(default_factory=dict)

    def name(self, file: ShardFile) -> str:
        """Address of the file."""
        return f"{self.address}/{file.name}"

    def path(self, file: ShardFile) -> str:
        """Path of the file in the cache, fetched first where it is not there. Raises BadImage."""
        path, now = self.cache.path(file), time.monotonic()
        since, reason = self._failed.get(file.sha256, (-_REST_SECONDS, ""))
        if now - since < _REST_SECONDS:  # the other images of a shard need not wait for every attempt once more
            raise BadImage("unreadable", reason)
        if now - self._used.get(file.sha256, -_TOUCH_SECONDS) >= _TOUCH_SECONDS:
            try:
                self._provide(file, path)
            except FetchError as error:
                self._failed[file.sha256] = time.monotonic(), str(error)
                raise BadImage("unreadable", str(error)) from None
            except OSError as error:
                raise BadImage("unreadable", f"{path}: {error.strerror or error}") from None
            self._used[file.sha256] = now
        return str(path)

    def renew(self, file: ShardFile) -> bool:
        """Throw away a copy that is not what it should be, so that the next `path` fetches another."""
        if self._used.pop(file.sha256, None) is None:  # there was no copy
            return False
        path = self.cache.path(file)
        with suppress(OSError):
            if sha256_of(path) != file.sha256:
                path.unlink()
        return True

    def _provide(self, file: ShardFile, path: Path) -> None:
        with suppress(FileNotFoundError):
            os.utime(path)  # makes it the one used last
            return
        with self.cache.locked(f".{path.name}.lock"):
            if not path.exists():  # else another process has fetched it in the meantime
                self.cache.make_room(file.bytes)
                fetch(self.name(file), path, file)


def fetch(address: str, path: Path, file: ShardFile) -> None:
    """Download a file, going on where a transfer broke off; it appears at `path` whole and verified, or not at all.

    Raises FetchError when the server does not answer, sends no more, or sends something else. Raises OSError of the
    local disk.
    """
    part = path.with_name(f".{path.name}.part")
    failures, reason = 0, ""
    while failures < ATTEMPTS:
        if failures:
            time.sleep(FIRST_WAIT * 2 ** (failures - 1))
        before = _size(part)
        try:
            reason = _append(address, part, file.bytes)
        except urllib.error.HTTPError as error:
            if error.code in _GONE:
                raise FetchError(f"{address}: the server answers {error.code} {error.reason}") from None
            reason = f"the server answers {error.code} {error.reason}"
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        if _size(part) == file.bytes:
            if sha256_of(part) == file.sha256:
                os.replace(part, path)
                return
            part.unlink()
            reason = "changed since the manifest was written, or damaged on the way: its checksum is another"
        failures = 1 if before < _size(part) else failures + 1
    raise FetchError(f"{address}: {reason}; given up after {ATTEMPTS} attempts without progress")


def _append(address: str, part: Path, size: int) -> str:
    """Add what the server sends to what is there already; returns why it is less than everything, if it is."""
    start = _size(part)
    if start >= size:  # of another file, or the disk's last words before a power cut
        part.unlink()
        start = 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
        if start and response.status != 206:  # a server that sends everything again
            start = 0
        with open(part, "r+b" if start else "wb") as file:
            file.seek(start)
            while block := response.read(min(_BLOCK, size + 1 - file.tell())):
                file.write(block)
            got = file.tell()
    if got > size:
        part.unlink()
        return f"changed since the manifest was written: more than the {size} bytes it says"
    return f"the transfer ended after {got} of {size} bytes"


def _download(address: str) -> bytes:
    """The manifest. Raises FetchError."""
    reason = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(FIRST_WAIT * 2 ** (attempt - 1))
        try:
            with urllib.request.urlopen(address, timeout=_TIMEOUT) as response:
                text: bytes = response.read(_MANIFEST_LIMIT)
                length = response.headers.get("Content-Length")
                if length is None or len(text) == int(length):
                    return text
                reason = f"the transfer ended after {len(text)} of {length} bytes"
        except urllib.error.HTTPError as error:
            reason = f"the server answers {error.code} {error.reason}"
            if error.code in _GONE:
                break
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
    raise FetchError(f"{address}: {reason}")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
