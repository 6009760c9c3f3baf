"""Rerun the fault drills and write their counts into docs/RELIABILITY.md.

    python scripts/run_drills.py [--quick] [--report FILE.jsonl] [--no-run]

--quick: the subset of the default test run. --report: keep the counts in this file. --no-run: only write the table from
it. Exit status: 0 every drill passed; 1 some failed (the table is left as it was); 2 bad usage.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from acmix.checkpoint.atomic import prove_writable, write_atomically
from acmix.errors import UserError
from acmix.process.environment import describe_machine
from acmix.process.program import Arguments, run_program

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "RELIABILITY.md"
BEGIN, END = "<!-- drills: begin -->", "<!-- drills: end -->"
_ROW = {"drill": str, "promise": str, "test": str, "survived": int, "tried": int}
PLACES = (
    "tests/drills",
    "tests/checkpoint",
    "tests/process",
    "tests/engine",
    "tests/data",
    "tests/scripts",
    "tests/config",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_program(lambda: run(arguments))


def run(arguments: Sequence[str] | None) -> int:
    """Run the drills as asked and write the table; returns the exit status."""
    parser = Arguments(prog="run_drills.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the subset of the default test run")
    parser.add_argument("--report", type=Path, metavar="FILE", help="where to keep the counts")
    parser.add_argument("--no-run", action="store_true", help="only write the table from --report FILE")
    options = parser.parse_args(arguments)
    if options.no_run:
        if options.report is None or not options.report.is_file():
            raise UserError("--no-run needs --report FILE, with the counts of an earlier run")
        write_table(options.report)
        return 0
    _split_document()
    prove_writable("the table's file", DOCUMENT)
    if options.report is not None:
        prove_writable("--report", options.report)
        options.report.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        counts = options.report or Path(folder) / "drills.jsonl"
        counts.unlink(missing_ok=True)
        marks = "not slow and not gpu" + (" and not drill" if options.quick else "")
        command = [sys.executable, "-m", "pytest", "-m", marks, "--timeout", "3600", "-q", *PLACES]
        ended = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "ACMIX_DRILL_REPORT": str(counts.absolute())}, check=False
        )
        if ended.returncode != 0:
            return 1
        write_table(counts)
    return 0


def write_table(counts: Path) -> None:
    """Replace the table in docs/RELIABILITY.md. Raises UserError for bad counts or a document without its lines."""
    before, after = _split_document()
    rows = read_counts(counts)
    write_atomically(DOCUMENT, f"{before}{BEGIN}\n\n{render(rows)}\n\n{provenance()}\n\n{END}{after}")
    print(f"Wrote {len({row['drill'] for row in rows})} drills to {DOCUMENT.relative_to(ROOT)}")


def read_counts(file: Path) -> list[dict[str, Any]]:
    """The rows of the report that the drills have written. Raises UserError naming the line that is none."""
    rows = []
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            row = json.loads(line)
            sound = all(isinstance(row[key], kind) for key, kind in _ROW.items())
        except (ValueError, LookupError, TypeError):
            sound = False
        if not sound:
            raise UserError(f"--report {file}:{number}: is no count of a drill; run the drills again, without --no-run")
        rows.append(row)
    return rows


def _split_document() -> tuple[str, str]:
    """What stands before the table and after it."""
    text = DOCUMENT.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise UserError(f"{DOCUMENT}: the lines {BEGIN} and {END} that hold the table's place are missing")
    before, _, rest = text.partition(BEGIN)
    return before, rest.partition(END)[2]


def render(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table with one line per drill: promise, tests, survived / tried."""
    drills: dict[str, dict[str, Any]] = {}
    for row in rows:
        total = drills.setdefault(row["drill"], {"promise": row["promise"], "tests": {}, "survived": 0, "tried": 0})
        total["survived"] += row["survived"]
        total["tried"] += row["tried"]
        total["tests"][row["test"]] = None
    lines = ["| Drill | Promise | Test | Survived / tried |", "| --- | --- | --- | ---: |"]
    for name, total in sorted(drills.items()):
        tests = "<br>".join(f"`{test.removeprefix('tests/')}`" for test in sorted(total["tests"]))
        lines.append(f"| {name} | {total['promise']} | {tests} | {total['survived']:,} / {total['tried']:,} |")
    return "\n".join(lines)


def provenance() -> str:
    """Date, versions and processor of the machine that ran the drills."""
    machine = describe_machine()
    return (
        f"Run on {machine.date.partition(' ')[0]} with Python {machine.versions['python']}, "
        f"torch {machine.versions['torch']}, {machine.system}, {machine.cores} × {machine.processor}."
    )


if __name__ == "__main__":
    sys.exit(main())
