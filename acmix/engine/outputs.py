"""The files that an evaluation writes: proved before the work, written after its line is printed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from acmix.checkpoint.atomic import prove_writable, write_atomically
from acmix.engine.confusion import write_report


@dataclass(frozen=True)
class Outputs:
    """json: file that repeats the result's line; report: folder of the per-class results. None: not asked for."""

    json: Path | None
    report: Path | None

    def prove(self) -> None:
        """Raise UserError, naming the option, for a place that cannot be written."""
        if self.json:
            prove_writable("--json", self.json)
        if self.report:
            prove_writable("--report", self.report, folder=True)

    def write(
        self, line: str, matrix: np.ndarray | None, classes: list[str], present: Sequence[int] | None = None
    ) -> None:
        """Write both, the second also if the first cannot be; arguments as of `write_report`. Raises UserError."""
        try:
            if self.json:
                write_atomically(self.json, line + "\n", make_parents=True)
        finally:
            if self.report and matrix is not None:
                write_report(self.report, matrix, classes, present)
