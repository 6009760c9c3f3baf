"""What a study runs: a folder and a command for each arm and seed, checked before anything starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from acmix.config import Config, as_override, load_config
from acmix.errors import UserError
from acmix.paths import escape_path
from acmix.studies.schema import OWN_KEYS, Study, overlapping


@dataclass(frozen=True)
class Run:
    """One run: an arm with a seed.

    folder: its run.dir; log: the file that gets its output; arguments: those of train.py; config: what they make.
    """

    arm: str
    seed: int
    folder: Path
    arguments: tuple[str, ...]
    config: Config = field(repr=False, compare=False)

    @property
    def log(self) -> Path:
        """`seed-N.log` beside the run's folder."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def label(self) -> str:
        """The run for people."""
        return f"{self.arm} seed {self.seed}"


def check_overrides(study: Study, overrides: Sequence[str]) -> None:
    """UserError for a `KEY=VALUE` of the command line that the study or one of its arms sets."""
    for override in overrides:
        if (key := override.partition("=")[0]) in OWN_KEYS:
            raise UserError(f"command line: {key} is set by the study; choose --out, or seeds in the study file")
    for arm, settings in study.arms.items():
        if problem := overlapping(overrides, settings):
            raise UserError(f"command line: {problem} as arm {arm} of the study; change the study file")


def arm_config(study: Study, arm: str, overrides: Sequence[str]) -> Config:
    """An arm's config in the run of the first seed, with further overrides. Raises UserError that names the arm."""
    try:
        return load_config(study.base, [*overrides, *study.settings(arm, study.seeds[0])])
    except UserError as error:
        raise UserError(f"arm {arm}: {error}") from None


def plan_run(
    study: Study, arm: str, seed: int, folder: Path, overrides: Sequence[str], added: Mapping[str, object]
) -> Run:
    """The run of an arm with a seed in `folder`; `added` are keys that follow from what all arms get the same of."""
    own = {**added, "run.dir": escape_path(str(folder)), "run.seed": seed}
    given = [text for text in (*overrides, *study.settings(arm, seed)) if text.partition("=")[0] not in own]
    every = [*given, *(as_override(key, value) for key, value in own.items())]
    arguments = ("--config", str(study.base), "--resume", "auto", *every)
    return Run(arm, seed, folder, arguments, load_config(study.base, every))


def plan_study(
    study: Study, out: Path, overrides: Sequence[str], added: Mapping[str, Mapping[str, object]]
) -> list[Run]:
    """All runs, the first seed of every arm before the second: what is there early compares all arms.

    A run lies in `out/runs/ARM/seed-N`. added: keys of each arm besides those of the study.
    """
    return [
        plan_run(study, arm, seed, out / "runs" / arm / f"seed-{seed}", overrides, added[arm])
        for seed in study.seeds
        for arm in study.arms
    ]
