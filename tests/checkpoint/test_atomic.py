"""Replacing a file: a reader sees the old one or the new one, and a failure leaves the old one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from acmix.checkpoint.atomic import prove_writable, replacing, write_atomically
from acmix.errors import UserError


def test_the_old_text_stands_until_the_new_one_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    write_atomically(file, "old")
    with replacing(file) as temporary:
        temporary.write_text("ne")
        assert temporary.suffix == ".json"
        assert file.read_text() == "old"
        temporary.write_text("new ≠ old", encoding="utf-8")
    assert file.read_text(encoding="utf-8") == "new ≠ old"
    assert os.listdir(tmp_path) == ["summary.json"]


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    file.write_text("old")
    with pytest.raises(TypeError), replacing(file) as temporary, temporary.open("w") as half:
        half.writelines(["half", 1])  # type: ignore[list-item]
    with pytest.raises(UserError, match=r"cannot write .*picture\.png: .*choose another place"), replacing(file):
        pass  # a writer that wrote nothing
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["picture.png"]


@pytest.mark.parametrize("place", [".", "missing/result.json", "file/result.json"])
def test_a_place_that_cannot_be_written_is_named_with_the_way_out(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"cannot write {tmp_path / place}: .*; make it writable or choose another"):
        write_atomically(tmp_path / place, "text")
    assert os.listdir(tmp_path) == ["file"]


def test_a_pipe_is_written_and_not_replaced(tmp_path: Path) -> None:
    program = "from pathlib import Path; from acmix.checkpoint.atomic import write_atomically as write; "
    program += "write(Path('/proc/self/fd/1'), 'text')"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "text"


def test_a_place_that_can_be_written_is_proved_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("old")
    prove_writable("--json", tmp_path / "old.json")
    prove_writable("--json", tmp_path / "new" / "folders" / "x.json")
    prove_writable("--report", tmp_path / "report", folder=True)
    prove_writable("--json", Path("/dev/null"))
    assert os.listdir(tmp_path) == ["old.json"]
    assert (tmp_path / "old.json").read_text() == "old"
    write_atomically(tmp_path / "new" / "folders" / "x.json", "text", make_parents=True)
    assert (tmp_path / "new" / "folders" / "x.json").read_text() == "text"


@pytest.mark.parametrize(
    ("place", "folder", "reason"),
    [
        (".", False, "it is a folder"),
        ("file/new/x.json", False, "Not a directory"),
        ("file", True, "Not a directory"),
        ("/proc/x/y.json", False, "No such file or directory"),
        ("/proc/x", True, "No such file or directory"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_naming_the_option(
    tmp_path: Path, place: str, folder: bool, reason: str
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"^--out {tmp_path / place}: cannot write there: {reason}; .* another place"):
        prove_writable("--out", tmp_path / place, folder=folder)
    assert os.listdir(tmp_path) == ["file"]


def test_what_a_killed_writer_left_is_cleared_by_the_next(tmp_path: Path) -> None:
    program = (
        "import os; from pathlib import Path; from acmix.checkpoint.atomic import replacing\n"
        "with replacing(Path('result.json')) as temporary:\n    temporary.write_text('half'); os.kill(os.getpid(), 9)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=False)
    assert len(os.listdir(tmp_path)) == 1
    living = tmp_path / f".result.{os.getppid()}.json"
    living.touch()
    write_atomically(tmp_path / "result.json", "whole")
    assert sorted(os.listdir(tmp_path)) == sorted([living.name, "result.json"])


def test_a_standard_stream_is_written_and_not_replaced_by_a_file(tmp_path: Path) -> None:
    link = Path("/dev/stdout").readlink()
    program = "from pathlib import Path; from acmix.checkpoint.atomic import write_atomically as write; "
    program += "write(Path('/dev/stdout'), 'text')"
    with open(tmp_path / "out", "w") as out:
        subprocess.run([sys.executable, "-c", program], stdout=out, check=True)
    assert (tmp_path / "out").read_text() == "text"
    assert Path("/dev/stdout").readlink() == link


def test_a_name_that_is_not_utf_8_is_read_back_from_json(tmp_path: Path) -> None:
    write_atomically(tmp_path / "names.json", json.dumps(["猫", "d\udcff"], ensure_ascii=False))
    assert json.loads((tmp_path / "names.json").read_text(encoding="utf-8")) == ["猫", "d\udcff"]
