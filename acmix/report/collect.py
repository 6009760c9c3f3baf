"""What run folders hold, finished or not, and which of them are seeds of one arm."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from acmix.config.resume import shown, values_before_keys
from acmix.config.yaml import read_yaml
from acmix.engine.run_folder import CONFIG, METRICS
from acmix.errors import UserError
from acmix.paths import missing_path_hint
from acmix.studies.found import WITHOUT_EFFECT
from acmix.telemetry.record import Row, as_number, key_paths, read_rows

OF_A_SEED = ("run.seed", "run.dir")
"""Keys in which the seeds of one arm differ."""

_STOPPED = {"requeue": "stopped by a signal", "failed": "failed"}


@dataclass(frozen=True, eq=False)
class Run:
    """One run: its folder, its config as key path → value (empty where none can be read), the rows of its record."""

    folder: Path
    config: Mapping[str, Any]
    rows: Sequence[Row] = field(repr=False)

    @property
    def seed(self) -> str:
        """`run.seed`, "?" where the config does not say."""
        return str(self.config.get("run.seed", "?"))

    @cached_property
    def start(self) -> Row:
        """The last `start` row: config, versions, device; empty where the run never got so far."""
        return self._last("start")

    @cached_property
    def end(self) -> Row:
        """The `end` row; empty for a run that did not write one."""
        return self._last("end")

    @property
    def finished(self) -> bool:
        """Whether it came to the end of its schedule."""
        return self.end.get("status") == "done"

    @cached_property
    def evaluations(self) -> list[Row]:
        """The `eval` rows, in order."""
        return [row for row in self.rows if row["event"] == "eval"]

    @property
    def step(self) -> int:
        """The last step logged."""
        return max((row["step"] for row in self.rows), default=0)

    def told(self) -> str:
        """How far it is, for people."""
        if self.finished:
            return "finished"
        total = self.start.get("steps")
        reached = f"at step {self.step:,}" + (f" of {total:,}" if isinstance(total, int) else "")
        if not self.rows:
            return "never started: its record is empty"
        if not self.end:
            return f"no end in its record (killed, or still running) {reached}"
        status = str(self.end.get("status"))
        return f"{_STOPPED.get(status, status)} {reached}"

    def series(self, event: str, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of a key in the rows of an event; steps without a number are left out."""
        logged = {row["step"]: as_number(row.get(key)) for row in self.rows if row["event"] == event}
        known = [(float(step), value) for step, value in sorted(logged.items()) if value is not None]
        return [step for step, _ in known], [value for _, value in known]

    def _last(self, event: str) -> Row:
        return next((row for row in reversed(self.rows) if row["event"] == event), {})


@dataclass(frozen=True, eq=False)
class Arm:
    """Runs that differ in nothing but their seed."""

    name: str
    runs: Sequence[Run]

    @property
    def config(self) -> Mapping[str, Any]:
        """What its runs have in common."""
        return {key: value for key, value in self.runs[0].config.items() if key not in OF_A_SEED}

    @property
    def judged(self) -> Sequence[Run]:
        """The runs whose results count: those that finished, else all that were evaluated."""
        return [run for run in self.runs if run.finished and run.evaluations] or [
            run for run in self.runs if run.evaluations
        ]


def collect(folders: Sequence[Path], names: Sequence[str] | None = None) -> list[Arm]:
    """Read run folders and group them into arms, in order of appearance.

    Runs are of one arm if their configs train the same but for `OF_A_SEED`; with `names`, one a folder, if their names
    are equal.
    Raises UserError for a folder that is given twice or holds no run.
    """
    seen: set[Path] = set()
    for folder in folders:
        if folder.resolve() in seen:
            raise UserError(f"{folder} is given twice: a standard deviation needs different runs")
        seen.add(folder.resolve())
    runs = [read_run(folder) for folder in folders]
    groups: dict[str, list[Run]] = {}
    for i, run in enumerate(runs):
        key = names[i] if names is not None else _identity(run)
        groups.setdefault(key, []).append(run)
    if names is not None:
        return [Arm(name, members) for name, members in groups.items()]
    arms: list[Arm] = []
    for members in groups.values():
        wanted = _name(members[0])
        alike = sum(re.fullmatch(rf"{re.escape(wanted)}( \(\d+\))?", arm.name) is not None for arm in arms)
        arms.append(Arm(f"{wanted} ({alike + 1})" if alike else wanted, members))
    return arms


def read_run(folder: Path) -> Run:
    """One run folder. Raises UserError where there is neither a config nor a record of a run."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder{'' if folder.exists() else missing_path_hint(folder)}")
    if not (folder / CONFIG).is_file() and not (folder / METRICS).is_file():
        inside = sorted(path.parent for path in folder.rglob(METRICS))
        hint = f"; it holds runs, such as {inside[0]}: give those" if inside else ""
        raise UserError(f"{folder}: not a run folder, it holds neither {CONFIG} nor {METRICS}{hint}")
    rows = list(read_rows(folder / METRICS))
    return Run(folder, _read_config(folder, rows), rows)


def differences(arms: Sequence[Arm]) -> dict[str, list[str]]:
    """Key path → its value in each arm, for the keys in which arms differ; – where an arm lacks the key."""
    keys = dict.fromkeys(key for arm in arms for key in arm.config)
    values = {key: [shown(arm.config[key]) if key in arm.config else "–" for arm in arms] for key in keys}
    return {key: cells for key, cells in values.items() if len(set(cells)) > 1}


def common(values: Mapping[str, str]) -> str:
    """One text for what several runs say: the value itself where all agree, else each value with who says it."""
    by_value: dict[str, list[str]] = {}
    for who, value in values.items():
        by_value.setdefault(value, []).append(who)
    if len(by_value) == 1:
        return next(iter(by_value))
    return "; ".join(f"{value} ({', '.join(who)})" for value, who in by_value.items())


def _read_config(folder: Path, rows: Sequence[Row]) -> Mapping[str, Any]:
    """From `config.yaml`, else from the record; a file that cannot be read is as good as none.

    Keys that are younger than the run have what it did before there were any.
    """
    try:
        values = read_yaml((folder / CONFIG).read_text(encoding="utf-8"), str(folder / CONFIG)).values
    except (OSError, UnicodeDecodeError, UserError):
        values = None
    if not isinstance(values, dict):
        values = next((row["config"] for row in rows if isinstance(row.get("config"), dict)), {})
    if not values:
        return {}
    for section, before in values_before_keys().items():
        known = values.get(section, {})
        if isinstance(known, dict):
            values = values | {section: known | {key: value for key, value in before.items() if key not in known}}
    return dict(key_paths(values))


def _identity(run: Run) -> str:
    """Equal for runs of one arm; a run without a config is an arm of its own."""
    if not run.config:
        return str(run.folder.resolve())
    return repr(sorted((k, shown(v)) for k, v in run.config.items() if k not in (*OF_A_SEED, *WITHOUT_EFFECT)))


def _name(run: Run) -> str:
    """The arm's folder in a study, `run.name` in runs/NAME/DATE, else the folder itself."""
    folder = run.folder.resolve()
    above = folder.parent.name
    return above if re.fullmatch(r"seed-\d+", folder.name) or above == run.config.get("run.name") else folder.name
