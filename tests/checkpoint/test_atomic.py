"""Replacing a file: a reader sees the old one or the new one, and a failure leaves the old one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from acmix.checkpoint.atomic import replacing, write_atomically
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
