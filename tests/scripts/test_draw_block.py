"""The drawing of the block in the README."""

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]


def draw(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/draw_block.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_drawing_in_docs_is_what_the_script_draws(tmp_path):
    out = tmp_path / "block.svg"
    assert draw(str(out)).returncode == 0
    assert out.read_text() == (ROOT / "docs" / "block.svg").read_text()
    assert ElementTree.parse(out).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    done = draw(str(tmp_path / "file" / "block.svg"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
