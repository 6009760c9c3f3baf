"""docs/EXTENDING.md is run as a reader would run it: its files written down, its commands typed, in an empty folder."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "EXTENDING.md"


def sections() -> dict[str, str]:
    """Heading → text below it."""
    _, *parts = re.split(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def write_files(text: str, folder: Path) -> None:
    """Every block of Python opens with a comment that names its file."""
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        name = re.match(r"# (\w+\.py)\n", block)
        assert name, f"a block does not name its file:\n{block}"
        (folder / name[1]).write_text(block, encoding="utf-8")


@pytest.mark.parametrize("heading", sections())
def test_a_section_works_as_it_is_written(heading: str, tmp_path: Path, launcher: Any) -> None:
    text = sections()[heading]
    write_files(text, tmp_path)
    commands = [line for block in re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL) for line in block.splitlines()]
    assert commands, f"the section {heading} runs nothing"
    for command in commands:
        python, program, *arguments = shlex.split(command)
        assert python == "python"
        if program == "-c":
            program, code = "command.py", arguments.pop(0)
            (tmp_path / program).write_text(code)
        found = [ROOT / part if part.startswith("configs/") else part for part in arguments]
        place = ROOT if program == "train.py" else tmp_path
        ended = launcher.start(place / program, *found, folder=tmp_path, fresh=True)
        assert ended.wait(240) == 0, f"{command}\n{ended.output}\n{ended.errors}"
