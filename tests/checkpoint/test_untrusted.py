"""Untrusted weights: harmless files load; hostile ones are refused, with what they ask for named, and run nothing."""

import argparse
import hashlib
import io
import os
import pickle
import pickletools
import struct
import sys
import tarfile
import tracemalloc
import types
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from acmix.checkpoint.manifest import FileRecord, read_manifest, render_manifest
from acmix.checkpoint.read import load_checkpoint, resolve_weights
from acmix.checkpoint.snapshot import Snapshot
from acmix.checkpoint.store import CheckpointStore
from acmix.checkpoint.untrusted import load_pickle_file, load_state_dict_file, load_weights_file
from acmix.errors import UserError

WEIGHTS = {"conv.weight": torch.arange(6.0).reshape(2, 3), "conv.bias": torch.zeros(2)}


class Call:
    """Pickles as a call of `module.name(*arguments)`: the usual shape of an attack."""

    def __init__(self, module: str, name: str, *arguments: Any, state: Any = None) -> None:
        self.target = (module, name)
        self.arguments = arguments
        self.state = state


class HostilePickler(pickle._Pickler):
    """A pickler that writes any global it is told to, importable or not."""

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if not isinstance(obj, Call):
            super().save(obj, save_persistent_id)
            return
        self.write(pickle.GLOBAL + "{}\n{}\n".format(*obj.target).encode())
        super().save(obj.arguments)
        self.write(pickle.REDUCE)
        if obj.state is not None:
            super().save(obj.state)
            self.write(pickle.BUILD)


def dumps(content: Any, protocol: int = 2) -> bytes:
    buffer = io.BytesIO()
    HostilePickler(buffer, protocol).dump(content)
    return buffer.getvalue()


def payloads(sentinel: Path) -> dict[str, tuple[Any, str]]:
    """name → (object to pickle, global that the refusal must name); each one touches the sentinel if it runs."""
    touch = f"touch {sentinel}"
    code = f"open({str(sentinel)!r}, 'w')"
    path = str(sentinel)
    return {
        "os.system": (Call("os", "system", touch), "os.system"),
        "posix.system": (Call("posix", "system", touch), "posix.system"),
        "nt.system": (Call("nt", "system", touch), "nt.system"),
        "os.popen": (Call("os", "popen", touch), "os.popen"),
        "os.execvp": (Call("os", "execvp", "touch", ["touch", path]), "os.execvp"),
        "os.mknod": (Call("os", "mknod", path), "os.mknod"),
        "eval": (Call("builtins", "eval", code), "builtins.eval"),
        "exec": (Call("builtins", "exec", code), "builtins.exec"),
        "python 2 eval": (Call("__builtin__", "eval", code), "__builtin__.eval"),
        "open": (Call("builtins", "open", path, "w"), "builtins.open"),
        "io.open": (Call("io", "open", path, "w"), "io.open"),
        "import": (Call("builtins", "__import__", "antigravity"), "builtins.__import__"),
        "getattr chain": (
            Call("builtins", "getattr", Call("importlib", "import_module", "os"), "system"),
            "importlib.import_module",
        ),
        "operator.attrgetter": (Call("operator", "attrgetter", "system"), "operator.attrgetter"),
        "operator.methodcaller": (Call("operator", "methodcaller", "system", touch), "operator.methodcaller"),
        "functools.partial": (Call("functools", "partial", Call("os", "system", touch)), "functools.partial"),
        "functools.reduce": (Call("functools", "reduce", Call("os", "system", touch), [1]), "functools.reduce"),
        "subprocess.Popen": (Call("subprocess", "Popen", ["touch", path]), "subprocess.Popen"),
        "subprocess.check_output": (Call("subprocess", "check_output", ["touch", path]), "subprocess.check_output"),
        "runpy": (Call("runpy", "_run_code", code, {}), "runpy._run_code"),
        "code interpreter": (Call("code", "interact"), "code.interact"),
        "pty.spawn": (Call("pty", "spawn", ["touch", path]), "pty.spawn"),
        "pathlib write": (Call("pathlib", "Path.touch", path), "pathlib.Path.touch"),
        "shutil.copy": (Call("shutil", "copy", "/etc/hostname", path), "shutil.copy"),
        "pickle.loads": (Call("pickle", "loads", dumps(Call("os", "system", touch))), "pickle.loads"),
        "torch.load": (Call("torch", "load", path), "torch.load"),
        "torch.hub": (Call("torch.hub", "load", path, "model"), "torch.hub.load"),
        "torch loader of modules": (
            Call("torch.jit._script", "load", path),
            "torch.jit._script.load",
        ),
        "import by dotted path": (
            Call("hydra.utils", "instantiate", {"_target_": "os.system", "command": touch}),
            "hydra.utils.instantiate",
        ),
        "torch dynamo import": (Call("torch._dynamo.utils", "import_submodule", path), "torch._dynamo.utils.import"),
        "numpy load": (Call("numpy", "load", path), "numpy.load"),
        "numpy object scalar": (
            Call("numpy.core.multiarray", "scalar", Call("numpy", "dtype", "O"), dumps(Call("os", "system", touch))),
            "numpy.core.multiarray.scalar",
        ),
        "setstate": (Call("codeop", "Compile", state={"flags": 1}), "codeop.Compile"),
        "ctypes": (Call("ctypes", "CDLL", path), "ctypes.CDLL"),
        "webbrowser": (Call("webbrowser", "open", "file://" + path), "webbrowser.open"),
        "timeit": (Call("timeit", "timeit", code), "timeit.timeit"),
        "distutils": (Call("distutils.file_util", "write_file", path, ["x"]), "distutils.file_util.write_file"),
        "nested in the optimizer": (
            {"model": WEIGHTS, "optimizer": {"state": {0: Call("os", "system", touch)}}},
            "os.system",
        ),
        "key of a dict": ({Call("os", "system", touch): 1}, "os.system"),
    }  # fmt: skip


PAYLOADS = tuple(payloads(Path("sentinel")))


@pytest.fixture
def sentinel(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "sentinel"
    yield path
    assert not path.exists(), "the payload ran"


def as_torch_zip(content: Any, path: Path) -> None:
    """torch.save's present format, with our pickle in place of its own."""
    torch.save(WEIGHTS, path)
    with zipfile.ZipFile(path) as archive:
        records = {item.filename: archive.read(item) for item in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, dumps(content) if name.endswith("data.pkl") else data)


def as_torch_legacy(content: Any, path: Path) -> None:
    """torch.save's format before 1.6: five pickles in a row."""
    parts = [dumps(0x1950A86A20F9469CFC6C), dumps(1001), dumps({"little_endian": True}), dumps(content), dumps([])]
    path.write_bytes(b"".join(parts))


def as_torch_tar(content: Any, path: Path) -> None:
    """torch.save's format before 0.1.10: a tar."""
    with tarfile.open(path, "w") as archive:
        for name, data in (("sys_info", dumps({})), ("pickle", dumps(content)), ("storages", b""), ("tensors", b"")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def as_bare_pickle(content: Any, path: Path) -> None:
    path.write_bytes(dumps(content))


FORMATS = {".pth": as_torch_zip, ".pt": as_torch_legacy, ".tar": as_torch_tar, ".pkl": as_bare_pickle}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("name", PAYLOADS)
def test_a_hostile_pickle_is_refused_by_the_name_of_its_global(
    name: str, suffix: str, tmp_path: Path, sentinel: Path, report: Callable[..., None]
) -> None:
    content, wanted = payloads(sentinel)[name]
    path = tmp_path / f"hostile{suffix}"
    FORMATS[suffix](content, path)
    with pytest.raises(UserError, match="refused, its pickle asks for") as caught:
        load_state_dict_file(path)
    assert wanted in str(caught.value)
    assert str(path) in str(caught.value)
    report("Hostile pickle read as weights", "Refused naming the global; nothing is executed", 1, 1)


@pytest.mark.parametrize("protocol", range(6))
def test_every_pickle_protocol_is_read_for_the_name(protocol: int, tmp_path: Path, sentinel: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
            return os.system, (f"touch {sentinel}",)

    path = tmp_path / "hostile.pkl"
    path.write_bytes(pickle.dumps({"model": Attack()}, protocol))
    with pytest.raises(UserError, match=r"(posix|nt)\.system"):
        load_state_dict_file(path)


def test_a_global_hidden_behind_the_memo_is_named(tmp_path: Path, sentinel: Path) -> None:
    path = tmp_path / "hostile.pkl"
    command = f"touch {sentinel}".encode()
    path.write_bytes(
        b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94" + b"00h\x00h\x01\x93" + b"X"
        + struct.pack("<I", len(command)) + command + b"\x85R."
    )  # fmt: skip
    assert [opcode.name for opcode, _, _ in pickletools.genops(path.read_bytes())].count("STACK_GLOBAL") == 1
    with pytest.raises(UserError, match=r"posix\.system"):
        load_state_dict_file(path)


def test_a_second_pickle_in_the_archive_is_not_read_either(tmp_path: Path, sentinel: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(WEIGHTS, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("weights/extra.pkl", dumps(Call("os", "system", f"touch {sentinel}")))
    assert load_state_dict_file(path)["conv.weight"].equal(WEIGHTS["conv.weight"])


def test_a_torchscript_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "script.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), str(path))
    with pytest.raises(UserError, match=r"script\.pt: "):
        load_state_dict_file(path)


def test_a_hostile_file_in_a_checkpoint_with_a_consistent_manifest_is_refused(tmp_path: Path, sentinel: Path) -> None:
    store = CheckpointStore(tmp_path, 3, background=False, on_error="stop")
    store.save(Snapshot(WEIGHTS, None, {}, {"step": 1}), best=False)
    folder = store.folder / "step_00000001"
    as_torch_zip({"optimizer": Call("os", "system", f"touch {sentinel}")}, folder / "training.pt")
    data = (folder / "training.pt").read_bytes()
    records = read_manifest(folder) | {"training.pt": FileRecord(hashlib.sha256(data).hexdigest(), len(data))}
    (folder / "manifest.json").write_bytes(render_manifest(1, records))
    with pytest.raises(UserError, match=r"training\.pt: refused, its pickle asks for os\.system"):
        load_checkpoint(folder)
    assert resolve_weights(folder).model.keys() == WEIGHTS.keys()


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".pkl", ".tar", ".ckpt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_harmless_weights_load_from_every_pickle_format(suffix: str, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=zipped)
    loaded = load_state_dict_file(path)
    assert loaded.keys() == WEIGHTS.keys()
    assert all(loaded[name].equal(tensor) for name, tensor in WEIGHTS.items())


@pytest.mark.parametrize("key", ["model", "state_dict", "module"])
def test_nested_weights_are_found_and_wrapper_prefixes_dropped(key: str, tmp_path: Path) -> None:
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in WEIGHTS.items()}
    torch.save({key: wrapped, "epoch": 3}, tmp_path / "weights.pth")
    assert load_state_dict_file(tmp_path / "weights.pth").keys() == WEIGHTS.keys()


def test_ema_weights_are_found(tmp_path: Path) -> None:
    averaged = {name: tensor + 1 for name, tensor in WEIGHTS.items()}
    torch.save({"state_dict": WEIGHTS, "state_dict_ema": averaged}, tmp_path / "weights.pth")
    model, ema = load_weights_file(tmp_path / "weights.pth")
    assert ema is not None
    assert model["conv.weight"].equal(WEIGHTS["conv.weight"])
    assert ema["conv.weight"].equal(WEIGHTS["conv.weight"] + 1)


def test_options_stored_beside_official_weights_are_read_as_plain_dicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Swin authors store a yacs CfgNode, timm an argparse.Namespace; neither class is imported to read them."""
    module = types.ModuleType("yacs.config")
    module.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    options = module.CfgNode({"MODEL": module.CfgNode({"TYPE": "swin"})})
    options.__dict__["__immutable__"] = True
    torch.save({"model": WEIGHTS, "config": options, "args": argparse.Namespace(lr=1)}, tmp_path / "official.pth")
    monkeypatch.undo()
    content = load_pickle_file(tmp_path / "official.pth")
    assert content["config"] == {"MODEL": {"TYPE": "swin"}}
    assert vars(content["args"]) == {"lr": 1}
    assert load_state_dict_file(tmp_path / "official.pth").keys() == WEIGHTS.keys()


@pytest.mark.parametrize("cut", [0.0, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_truncated_weights_file_is_called_damaged(cut: float, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    weights = {"weight": torch.randn(1000)}
    safetensors.torch.save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * cut)])
    with pytest.raises(UserError, match="damaged"):
        load_state_dict_file(path)


def test_a_flipped_bit_in_a_zipped_weights_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"weight": torch.zeros(1000)}, path)
    data = bytearray(path.read_bytes())
    data[data.index(b"\x00" * 1000) + 500] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        load_state_dict_file(path)


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pth"
    torch.save({"weight": torch.zeros(10)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {item.filename: archive.read(item) for item in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    with pytest.raises(UserError, match="compressed records"):
        load_state_dict_file(path)


def as_zip_bomb(path: Path, compression: int) -> None:
    archive = zipfile.ZipFile(path, "w", compression, compresslevel=1)
    with archive, archive.open("archive/data.pkl", "w", force_zip64=True) as record:
        for _ in range(512):
            record.write(bytes(1 << 20))


def as_sparse_tar(path: Path) -> None:
    """A tar of 3 kB whose member `pickle` is 512 MiB of nothing."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("pickle")
        member.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(512 << 20)}
        archive.addfile(member)


def as_nested_tar_headers(path: Path) -> None:
    name = tarfile.TarInfo("././@LongLink")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 1
    path.write_bytes((name.tobuf() + bytes(512)) * 2000)


def as_pairs_of_long_names(path: Path) -> None:
    """Every pair of 300 names of 64 KiB is asked for: 11 GiB of names in a file of 20 MB."""
    names = b"".join(b"X" + struct.pack("<I", 1 << 16) + b"%5d" % number * 13107 + b"a\x94" for number in range(300))
    pairs = b"".join(b"j" + struct.pack("<I", first) + b"j" + struct.pack("<I", second) + b"\x93"
                     for first in range(300) for second in range(300))  # fmt: skip
    path.write_bytes(b"\x80\x04" + names + pairs + b".")


@pytest.mark.parametrize(
    ("make", "suffix"),
    [
        pytest.param(lambda path: as_zip_bomb(path, zipfile.ZIP_DEFLATED), ".pth", id="deflated"),
        pytest.param(lambda path: as_zip_bomb(path, zipfile.ZIP_BZIP2), ".pth", id="bzip2", marks=pytest.mark.slow),
        pytest.param(as_sparse_tar, ".tar", id="sparse tar"),
        pytest.param(as_nested_tar_headers, ".tar", id="nested tar headers"),
        pytest.param(as_pairs_of_long_names, ".pkl", id="pairs of long names"),
    ],
)
def test_a_small_file_that_stands_for_a_large_one_is_refused_in_little_memory(
    make: Callable[[Path], None], suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"bomb{suffix}"
    make(path)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"bomb\.\w+: (damaged|refused)"):
            load_state_dict_file(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 256 << 20


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ([1, 2], "holds a list, not a dict of weights"),
        ({}, "it is empty"),
        ({"epoch": 3, "weight": torch.zeros(1)}, "these entries are no tensors: epoch"),
        ({"weight": torch.zeros(1), "table": torch.zeros(2).to_sparse()}, "sparse, .* on the meta device: table"),
        ({"weight": torch.zeros(1, device="meta")}, "on the meta device: weight"),
        (dict.fromkeys("abcdefg", 0), r"no tensors: a, b, c, d, e, … 7 in all"),
        ({"module.weight": torch.zeros(1), "weight": torch.ones(1)}, "two of its names differ only in the prefix"),
    ],
)
def test_a_file_without_weights_says_what_it_holds(content: Any, complaint: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=complaint):
        load_state_dict_file(tmp_path / "weights.pth")


def test_a_missing_file_and_an_unknown_kind_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.pth: no such weights file"):
        load_state_dict_file(tmp_path / "nowhere.pth")
    (tmp_path / "weights.zip").write_bytes(b"")
    with pytest.raises(UserError, match=r"unknown kind of weights file '\.zip'; known are \.safetensors"):
        load_state_dict_file(tmp_path / "weights.zip")
