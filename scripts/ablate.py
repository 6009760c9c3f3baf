"""Run a study, arms × seeds of one config, and compare the arms: results.json, .md, .png, .svg, and report.html.

    python scripts/ablate.py STUDY.yaml [--out DIR] [--dry-run | --collect | --print torchrun|slurm] [--jobs N]
                                        [--program FILE.py] [KEY.PATH=VALUE ...]

The runs lie in DIR/runs/ARM/seed-N, their output in DIR/runs/ARM/seed-N.log. A call that was stopped goes on where it
left off: finished runs stay, the others resume. KEY.PATH=VALUE holds for every run. --print gives the commands to start
the runs elsewhere; the same call without it then compares them. --program: a file of yours that registers parts and
hands over to train.main (docs/EXTENDING.md); it is imported here, and started for each run in place of train.py.

Exit status: 0 done; 2 bad usage, study or config, or every run that failed ended with 2; 75 stopped by a signal, start
it again; 1 a run failed for another reason.
"""

import argparse
import importlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from acmix.checkpoint.atomic import prove_writable, write_atomically
from acmix.config import Config
from acmix.cores import usable_cores
from acmix.engine.lock import RunLock
from acmix.errors import UserError, one_line
from acmix.json_text import json_text
from acmix.paths import missing_path_hint
from acmix.process.program import BAD_USAGE, DONE, FAILED, REQUEUE, Arguments, run_program
from acmix.process.signals import StopSignals
from acmix.report.collect import collect
from acmix.report.page import write_page
from acmix.studies.budget import Added, check_budget, equal_parameters, probe_keys, scaled_epochs
from acmix.studies.commands import command, line
from acmix.studies.found import state_of
from acmix.studies.outcome import Outcome, measured_rate, read_outcome
from acmix.studies.plan import Run, arm_config, check_overrides, plan_run, plan_study
from acmix.studies.plot import draw
from acmix.studies.progress import Forecast
from acmix.studies.results import missing, summarise
from acmix.studies.runner import Failure, Runner
from acmix.studies.schema import Study, load_study
from acmix.studies.size import Size, size_of
from acmix.studies.table import markdown
from acmix.telemetry.figure_file import save_figure

CHECKOUT = Path(__file__).resolve().parents[1]
TRAIN = CHECKOUT / "train.py"
LEFT_OUT = "a study leaves it out; scripts/report.py with these runs makes it"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a study as the command line says; returns the exit status."""
    signals = StopSignals()
    return run_program(lambda: ablate(arguments, signals), signals)


def ablate(arguments: Sequence[str] | None, signals: StopSignals) -> int:
    """Plan, run what is not finished, compare; returns the exit status. Raises UserError."""
    options = _arguments().parse_intermixed_args(arguments)
    if options.jobs < 1:
        raise UserError(f"--jobs: must be at least 1, got {options.jobs}")
    program = TRAIN if options.program is None else import_program(options.program, options.print)
    study = load_study(options.study)
    check_overrides(study, options.overrides)
    out = options.out or Path("runs", "studies", study.name)
    typed = shlex.join(sys.argv[1:] if arguments is None else arguments)
    desk = Desk(
        study, out, tuple(options.overrides), options.jobs, signals, f"python scripts/ablate.py {typed}", program
    )
    check_budget(study, desk.configs)
    if options.print:
        todo = [run for run in desk.plan(measure=False) if state_of(run) != "done"]
        for run in todo:
            print(line(run, options.print, study.name, CHECKOUT, program))
        return DONE
    if options.dry_run:
        print("\n".join(desk.describe()))
        return DONE
    prove_writable("--out", out, folder=True)
    if options.collect and not (out / "runs").is_dir():
        raise UserError(f"--collect: --out {out} holds no runs; give the folder of the study, or leave --collect out")
    with RunLock(out):
        return desk.work(start=not options.collect)


def _arguments() -> Arguments:
    parser = Arguments(prog="ablate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("study", type=Path, metavar="STUDY.yaml", help="name, base, arms, seeds, reference and, if wanted, equal")
    add("--out", type=Path, metavar="DIR", help="folder of the study (runs/studies/NAME)")
    instead = parser.add_mutually_exclusive_group().add_argument
    instead("--dry-run", action="store_true", help="check everything and print the plan; start and write nothing")
    instead("--collect", action="store_true", help="start nothing, compare what is finished")
    instead("--print", choices=("torchrun", "slurm"), help="print a command for each run that is not finished")
    add("--jobs", type=int, default=1, metavar="N", help="runs at a time, which share the cores (1)")
    add("--program", type=Path, metavar="FILE.py", help="a file of yours to start in place of train.py")
    add("overrides", nargs="*", metavar="KEY.PATH=VALUE", help="config values of every run")
    return parser


def import_program(file: Path, starter: str | None) -> Path:
    """Register the parts in a file of the user's, for the plan; returns where it is, to start. Raises UserError."""
    if file.suffix != ".py" or not file.is_file():
        raise UserError(f"--program {file}: no such file, or not .py{missing_path_hint(file)}")
    if starter == "slurm":
        raise UserError("--program: the job of --print slurm starts train.py; take --print torchrun in a job of yours")
    file = file.resolve()
    sys.path[:0] = [str(file.parent), str(CHECKOUT)]
    try:
        importlib.import_module(file.stem)
    except ImportError as error:
        raise UserError(f"--program {file}: cannot be imported: {one_line(error)}") from error
    return file


class Stopped(Exception):
    """A signal asked for a stop."""


@dataclass(frozen=True)
class Desk:
    """One call of the program: a study, its folder, and what was asked for on the command line.

    typed: the command, for the results; program: what starts a run.
    """

    study: Study
    out: Path
    overrides: tuple[str, ...]
    jobs: int
    signals: StopSignals
    typed: str
    program: Path

    @cached_property
    def configs(self) -> dict[str, Config]:
        """The config of each arm."""
        return {arm: arm_config(self.study, arm, self.overrides) for arm in self.study.arms}

    @cached_property
    def sizes(self) -> dict[str, Size]:
        """The size of each arm's network; UserError for one that cannot be built."""
        sizes = {}
        for arm, config in self.configs.items():
            try:
                sizes[arm] = size_of(config)
            except UserError as error:
                raise UserError(f"arm {arm}: {error}") from None
        return sizes

    def plan(self, *, measure: bool) -> list[Run]:
        """All runs. `measure` starts the short runs that equal time needs, where there are none yet."""
        return plan_study(self.study, self.out, self.overrides, self._budget(measure))

    def describe(self) -> list[str]:
        """The plan in lines: what each arm sets, its size and epochs, and how far each run is."""
        study, sizes = self.study, self.sizes
        measured = study.equal != "time" or all(self._is_measured(run) for run in self._probes())
        runs = self.plan(measure=False) if measured else plan_study(study, self.out, self.overrides, self._nothing())
        lines = [f"{study.name}: {len(study.arms)} arms × {len(study.seeds)} seeds of {study.base} in {self.out}"]
        for arm in study.arms:
            epochs = next(run.config.schedule.epochs for run in runs if run.arm == arm)
            told = f"{epochs} epochs" if measured else f"epochs for equal time: measured first, {epochs} as configured"
            size = f"{sizes[arm].parameters:,} parameters, {sizes[arm].multiply_adds:,} multiply-adds"
            mark = " (reference)" if arm == study.reference else ""
            lines.append(f"  {arm}{mark}: {' '.join(study.arms[arm]) or 'the base as it is'}; {size}, {told}")
        for run in runs:
            state = {"new": "to run", "begun": "to resume", "done": "done"}[state_of(run)]
            lines.append(f"  {run.label}: {state}, {run.folder}")
        return lines

    def work(self, *, start: bool) -> int:
        """Run what is not finished, unless told not to `start`, and write the results; returns the exit status."""
        sizes = self.sizes  # an arm that cannot be built is told before hours of runs
        try:
            runs = self.plan(measure=start)
            failures = self._run(runs, self.jobs) if start else []
        except Stopped:
            return REQUEUE
        self._compare(runs, sizes)
        for failure in failures:
            print(f"error: {failure}", file=sys.stderr, flush=True)
        if failures:
            return BAD_USAGE if all(failure.status == BAD_USAGE for failure in failures) else FAILED
        return DONE

    def _run(self, runs: Sequence[Run], jobs: int) -> list[Failure]:
        """Run those that are not finished; returns those that failed. Raises Stopped."""
        states = {run: state_of(run) for run in runs}
        todo = [run for run in runs if states[run] != "done"]
        forecast = Forecast(jobs)
        for run in runs:
            if states[run] == "done" and (outcome := read_outcome(run.folder)) is not None:
                forecast.add(run.arm, outcome.seconds)
        threads = max(1, usable_cores() // self.jobs) if self.jobs > 1 else None
        runner = Runner(
            partial(command, program=self.program, threads=threads),
            self.signals, jobs, forecast, total=len(runs), done=len(runs) - len(todo),
        )  # fmt: skip
        self.signals.begin()
        runner.run(todo)
        if runner.stopped:
            raise Stopped
        return runner.failures

    def _nothing(self) -> Added:
        return {arm: {} for arm in self.study.arms}

    def _budget(self, measure: bool) -> Added:
        """What each arm gets besides its own keys, so that all have the same of what the study says."""
        study = self.study
        if study.equal == "parameters":
            equal_parameters(study, {arm: size.parameters for arm, size in self.sizes.items()})
        if study.equal in ("epochs", "parameters"):
            return self._nothing()
        by_size = study.equal == "multiply_adds"
        rates = {arm: 1 / size.multiply_adds for arm, size in self.sizes.items()} if by_size else self._rates(measure)
        return scaled_epochs(study, self.configs[study.reference], rates)

    def _rates(self, measure: bool) -> dict[str, float]:
        """Images per second of each arm, from a short run of each, one at a time."""
        probes = self._probes()
        missing_ones = [run for run in probes if not self._is_measured(run)]
        if missing_ones and not measure:
            raise UserError(
                "equal: time needs each arm's images per second, measured here: run the study without --print"
            )
        if missing_ones:
            print("Measuring the images per second of each arm, in a short run", flush=True)
        if failures := self._run(probes, 1) if missing_ones else []:
            raise UserError(f"equal: time: cannot measure {failures[0]}")
        return {run.arm: measured_rate(run.folder) for run in probes}

    def _probes(self) -> list[Run]:
        study = self.study
        return [
            plan_run(study, arm, study.seeds[0], self.out / "probe" / arm, self.overrides, probe_keys())
            for arm in study.arms
        ]

    def _is_measured(self, run: Run) -> bool:
        return state_of(run) == "done"

    def _compare(self, runs: Sequence[Run], sizes: Mapping[str, Size]) -> None:
        """Write the results of what is finished, and print the table."""
        study = self.study
        outcomes: dict[str, dict[int, Outcome]] = {arm: {} for arm in study.arms}
        for run in runs:
            if state_of(run) == "done" and (outcome := read_outcome(run.folder)) is not None:
                outcomes[run.arm][run.seed] = outcome
        if not any(outcomes.values()):
            print(f"No run of {self.out} is finished: there is nothing to compare")
            return
        results = summarise(study, outcomes, sizes, self.configs[study.reference], self.overrides)
        table = markdown(results, self.typed)
        write_atomically(self.out / "results.json", json_text(results, indent=2) + "\n")
        write_atomically(self.out / "results.md", table)
        figure = draw(results)
        for suffix in (".png", ".svg"):
            save_figure(figure, self.out / f"results{suffix}")
        print(table, end="")
        for arm, seeds in missing(study, results).items():
            print(f"Not finished: {arm}, seeds {', '.join(map(str, seeds))}")
        begun = [run for run in runs if state_of(run) != "new"]
        arms = collect([run.folder for run in begun], [run.arm for run in begun])
        left_out = dict.fromkeys((run for arm in arms for run in arm.runs), LEFT_OUT)
        write_page(self.out / "report.html", arms, left_out, self.typed, results)
        print(f"Wrote {self.out}/results.json, results.md, results.png, results.svg and report.html")


if __name__ == "__main__":
    sys.exit(main())
