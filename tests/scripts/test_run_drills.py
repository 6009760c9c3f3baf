"""scripts/run_drills.py: the report of the drills is checked before the table is written."""

from pathlib import Path

import pytest

from scripts import run_drills

GOOD = '{"drill": "kill", "promise": "resumes", "test": "tests/a.py::b", "survived": 3, "tried": 3}'


@pytest.mark.parametrize("line", ["{", "[]", "3", '{"drill": "kill"}', GOOD.replace("3}", '"3"}')])
def test_a_report_that_holds_no_counts_is_refused_by_its_line(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report, before = tmp_path / "bad.jsonl", run_drills.DOCUMENT.read_bytes()
    report.write_text(f"{GOOD}\n{line}\n")
    assert run_drills.main(["--no-run", "--report", str(report)]) == 2
    assert f"error: --report {report}:2: is no count of a drill" in capsys.readouterr().err
    assert run_drills.DOCUMENT.read_bytes() == before
