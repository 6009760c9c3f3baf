"""Shards on a web server: fetched whole and verified or not at all, whatever the server does."""

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from acmix.config import Config
from acmix.data import remote
from acmix.data.arrays import ArraySource
from acmix.data.datasets import build_source
from acmix.data.images import BadImage
from acmix.data.loader import build_data
from acmix.data.prepare import Options, prepare
from acmix.data.remote import Cache
from acmix.data.shards import ShardFile, open_prepared
from acmix.errors import UserError

MakeConfig = Callable[..., Config]


class Server(SimpleHTTPRequestHandler):
    """Answers ranges, and misbehaves as `faults` says: name → what to do with the next requests for it."""

    faults: ClassVar[dict[str, list[str]]]
    asked: ClassVar[list[tuple[str, str]]]

    def do_GET(self) -> None:
        name = Path(self.path).name
        wanted = self.headers.get("Range", "")
        self.asked.append((name, wanted))
        fault = self.faults[name].pop(0) if self.faults.get(name) else ""
        path = Path(self.directory, name)
        if fault.isdigit() or not path.exists():
            self.send_error(int(fault or 404))
            return
        data = path.read_bytes()
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and fault != "no ranges" else 0
        part = data[start:]
        if fault == "other bytes":
            part = bytes(len(part))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if fault == "half":
            part = part[: max(1, len(part) // 2)]
        if fault != "nothing":
            self.wfile.write(part)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """16 training and 4 validation images in 4 shards each."""
    random = np.random.default_rng(0)
    sources = {
        split: ArraySource(split, random.integers(0, 256, (n, 16, 16, 3), dtype=np.uint8), np.arange(n) % 2, ["a", "b"])
        for split, n in (("train", 16), ("val", 4))
    }
    prepare(sources, tmp_path / "www", Options(shards=4))
    return tmp_path / "www"


@pytest.fixture
def server(files: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Server]]:
    """The class of the running server; `address` is where it listens."""
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)

    class Here(Server):
        faults: ClassVar[dict[str, list[str]]] = {}
        asked: ClassVar[list[tuple[str, str]]] = []
        address = ""

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Here, directory=str(files))) as running:
        Here.address = f"http://127.0.0.1:{running.server_port}/set"
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield Here
        running.shutdown()


@pytest.fixture
def settings(server: Any, tmp_path: Path) -> dict[str, Any]:
    return {"data__dataset": "wds/x", "data__root": server.address, "data__cache_dir": tmp_path / "cache"}


def everything(source: Any) -> list[tuple[bytes, int]]:
    return [source.read(i) for i in range(len(source))]


def test_images_from_a_server_are_those_on_its_disk_and_come_once(
    server: Any, settings: dict[str, Any], files: Path, tmp_path: Path, make_config: MakeConfig
) -> None:
    expected = everything(open_prepared(files, "train"))
    for _ in range(2):
        assert everything(build_source(make_config(**settings).data, "train")) == expected
    names = [name for name, _ in server.asked if name != "_info.json"]
    assert len(names) == len(set(names)) == 5, "four shards and the index"
    assert not list((tmp_path / "cache").glob(".*.part"))
    assert build_source(make_config(**settings).data, "train").describe(0).startswith(f"{server.address}/train-00000")


def test_loader_processes_share_one_download(server: Any, settings: dict[str, Any], make_config: MakeConfig) -> None:
    data = build_data(make_config(**settings, data__num_workers=3))
    assert len([batch for update in data.train.epoch(0) for batch in update]) == 4
    names = [name for name, _ in server.asked if name.endswith(".tar")]
    assert len(names) == len(set(names)) == 4


@pytest.mark.parametrize(
    "faults",
    [
        ["half"],
        ["half", "half", "half"],
        ["nothing", "503"],
        ["half", "no ranges"],
        ["half", "500", "half"],
        ["other bytes"],
    ],
    ids=str,
)
def test_a_transfer_that_breaks_off_goes_on(
    faults: list[str], server: Any, settings: dict[str, Any], files: Path, make_config: MakeConfig
) -> None:
    server.faults["train-000001.tar"] = list(faults)
    assert everything(build_source(make_config(**settings).data, "train")) == everything(open_prepared(files, "train"))
    ranges = [wanted for name, wanted in server.asked if name == "train-000001.tar"]
    assert len(ranges) == len(faults) + (faults[-1] != "no ranges"), "one more than went wrong"
    size = (files / "train-000001.tar").stat().st_size
    if faults[0] == "half":
        assert ranges[1] == f"bytes={size // 2}-"


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        (["half", *["nothing"] * 9], r"the transfer ended after \d+ of \d+ bytes; given up after 7 attempts"),
        (["other bytes"] * 9, "its checksum is another"),
        (["404"], "the server answers 404 Not Found"),
        (["500"] * 9, "the server answers 500 Internal Server Error; given up after 7"),
    ],
)
def test_a_shard_that_cannot_be_had_is_named_with_its_member_and_nothing_half_is_kept(
    faults: list[str], message: str, server: Any, settings: dict[str, Any], tmp_path: Path, make_config: MakeConfig
) -> None:
    server.faults["train-000001.tar"] = list(faults)
    where = rf"unreadable image: {server.address}/train-000001.tar: 0000000\d\d.jpg \(class .\): {server.address}/"
    with pytest.raises(UserError, match=f"{where}.*{message}"):
        list(build_data(make_config(**settings, data__batch_size=16)).train.epoch(0))
    assert not list((tmp_path / "cache").glob("*-train-000001.tar"))


def test_a_shard_that_cannot_be_had_is_left_out_as_configured(
    server: Any, settings: dict[str, Any], make_config: MakeConfig
) -> None:
    server.faults["train-000001.tar"] = ["404"] * 99
    config = make_config(**settings, data__batch_size=16, data__on_error="skip")
    [[batch]] = build_data(config).train.epoch(0)
    assert int((~batch.valid).sum()) == len(batch.errors) == 4


def test_a_shard_that_changed_on_the_server_is_refused(
    server: Any, settings: dict[str, Any], files: Path, make_config: MakeConfig
) -> None:
    source = build_source(make_config(**settings).data, "val")
    shutil.copy(files / "train-000000.tar", files / "val-000000.tar")
    with pytest.raises(BadImage, match="changed since the manifest was written"):
        source.read(0)


def test_a_damaged_copy_in_the_cache_is_fetched_again(
    server: Any, settings: dict[str, Any], files: Path, tmp_path: Path, make_config: MakeConfig
) -> None:
    source = build_source(make_config(**settings).data, "val")
    first = everything(source)
    for path in (tmp_path / "cache").glob("*-val-*.tar"):
        path.write_bytes(bytes(path.stat().st_size))
    assert everything(source) == first
    for path in (tmp_path / "cache").glob("*-val-*.tar"):
        path.unlink()
    assert everything(source) == first, "another run may have made room for its own"


def test_a_server_without_shards_or_that_is_gone_is_refused(
    server: Any, settings: dict[str, Any], files: Path, make_config: MakeConfig
) -> None:
    server.faults["_info.json"] = ["half", "503"]
    assert len(build_source(make_config(**settings).data, "val")) == 4
    server.faults["_info.json"] = ["404"]
    with pytest.raises(UserError, match=r"_info.json: the server answers 404 .*scripts/prepare_data.py"):
        build_source(make_config(**settings).data, "val")
    with pytest.raises(UserError, match=r"no split test; set data.train_split"):
        build_source(make_config(**settings).data, "test")
    nowhere = {**settings, "data__root": "http://127.0.0.1:9/set"}
    with pytest.raises(UserError, match=r"127.0.0.1:9/set/_info.json: .*refused"):
        build_source(make_config(**nowhere).data, "val")
    (files / "_info.json").write_text('{"splits": {}}')
    with pytest.raises(UserError, match=r"not of scripts/prepare_data.py"):
        build_source(make_config(**settings).data, "val")


def test_a_cache_too_small_for_a_split_or_that_cannot_be_written_is_refused(
    settings: dict[str, Any], tmp_path: Path, make_config: MakeConfig
) -> None:
    with pytest.raises(UserError, match=r"data.cache_size: 1e-06 GB are too few: train has"):
        build_source(make_config(**settings, data__cache_size=1e-6).data, "train")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data.cache_dir: .*cannot be written"):
        build_source(make_config(**settings | {"data__cache_dir": tmp_path / "file" / "x"}).data, "train")


def test_the_files_used_least_recently_make_room(tmp_path: Path) -> None:
    cache = Cache(tmp_path, limit=1000)
    files = [ShardFile(f"{i}.tar", 400, str(i) * 64) for i in range(3)]
    for age, file in enumerate(files[:2]):
        cache.path(file).write_bytes(bytes(400))
        os.utime(cache.path(file), (100 + age, 100 + age))
    os.utime(cache.path(files[0]), (200, 200))
    cache.make_room(400)
    assert [cache.path(file).exists() for file in files] == [True, False, False]
    cache.make_room(600)
    assert cache.path(files[0]).exists()
    cache.make_room(601)
    assert not cache.path(files[0]).exists()
