"""The command scripts/ablate.py: plan, results, refusals, exit statuses, and real runs."""

import json
import os
import shlex
import signal
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from acmix.config import load_config
from acmix.studies.budget import probe_keys
from acmix.studies.plan import Run, plan_run, plan_study
from acmix.studies.schema import load_study
from scripts import ablate

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "ablate.py"
ABLATE = str(SCRIPT)
OWN = """
import sys
import timm
import train

@timm.models.register_model
def net_of_my_own(pretrained=False, **kwargs):
    return timm.create_model("test_resnet", **kwargs)

if __name__ == "__main__":
    sys.exit(train.main())
"""
SCORES = {"learned": [60.0, 62.0, 61.5], "sum": [59.0, 60.0, 61.0]}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def runs(study_file: Path, out: Path) -> list[Run]:
    """The runs of the study, seed-major: learned and sum, then the next seed."""
    return plan_study(load_study(study_file), out, [], {"learned": {}, "sum": {}})


def test_finished_runs_become_results_table_and_picture(
    study_file: Path, out: Path, runs: list[Run], write_run: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for run in runs:
        write_run(run, SCORES[run.arm][run.seed], best=70.0, alpha=run.seed / 10)
    assert ablate.main([str(study_file), "--collect", "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    reference, arm = results["arms"]
    assert (reference["name"], reference["n"], reference["difference"], reference["p"]) == ("learned", 3, None, None)
    assert (arm["name"], arm["seeds"], arm["top1"], arm["best"]) == ("sum", [0, 1, 2], SCORES["sum"], [70.0] * 3)
    assert (arm["mean"], arm["std"], arm["n"]) == (60.0, pytest.approx(1.0), 3)
    assert arm["difference"] == pytest.approx(-7 / 6)
    assert arm["interval"][0] < arm["difference"] < arm["interval"][1]
    assert 0 < arm["p"] < 1
    assert arm["images_per_second"] == 100.0
    assert reference["parameters"] - arm["parameters"] == 16
    assert arm["multiply_adds"] > 1e6
    assert arm["paths"] == [
        {"stage": stage, "alpha": pytest.approx(0.1 + depth), "alpha_std": pytest.approx(0.1), "beta": 0.25,
         "beta_std": 0.0} for stage, depth in ((1, 1), (2, 3))
    ]  # fmt: skip
    table = (out / "results.md").read_text()
    assert "| sum     | 60.00 ± 1.00 | 3 |" in table
    assert "| -1.17 " in table
    assert f"Made by `python scripts/ablate.py {study_file} --collect" in table
    assert table in capsys.readouterr().out
    assert ET.parse(out / "results.svg").getroot().tag.endswith("svg")
    assert (out / "results.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text()
    assert page.index('<section id="study">') < page.index("60.00 ± 1.00") < page.index('<section id="what">')


def test_there_is_nothing_to_collect_where_nothing_lies(
    study_file: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablate.main([str(study_file), "--collect", "--out", str(out)]) == 2
    assert "holds no runs" in capsys.readouterr().err
    assert not out.exists()


def test_a_bar_in_the_name_of_an_arm_begins_no_column(
    study_file: Path, out: Path, write_run: Callable[..., None]
) -> None:
    study_file.write_text(study_file.read_text().replace("  sum: {", "  a|b: {"))
    for run in plan_study(load_study(study_file), out, [], {"learned": {}, "a|b": {}})[:2]:
        write_run(run)
    assert ablate.main([str(study_file), "--collect", "--out", str(out)]) == 0
    table = [line for line in (out / "results.md").read_text().splitlines() if line.startswith("|")]
    assert any(line.startswith(r"| a\|b ") for line in table)
    assert len({line.replace(r"\|", "").count("|") for line in table[:4]}) == 1


def test_an_arm_whose_name_is_no_formula_is_drawn(study_file: Path, out: Path, write_run: Callable[..., None]) -> None:
    study_file.write_text(study_file.read_text().replace("  sum: {", "  a$^$b: {"))
    for run in plan_study(load_study(study_file), out, [], {"learned": {}, "a$^$b": {}})[:2]:
        write_run(run)
    assert ablate.main([str(study_file), "--collect", "--out", str(out)]) == 0
    assert (out / "results.png").is_file()


def test_results_of_two_seeds_say_that_these_are_too_few_and_what_is_missing(
    study_file: Path, out: Path, runs: list[Run], write_run: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for run in runs[:3]:
        write_run(run, SCORES[run.arm][run.seed])
    assert ablate.main([str(study_file), "--collect", "--out", str(out)]) == 0
    _, arm = json.loads((out / "results.json").read_text())["arms"]
    assert (arm["difference"], arm["interval"], arm["p"], arm["pairs"], arm["std"]) == (-1.0, None, None, 1, None)
    shown = capsys.readouterr().out
    assert "n < 3" in shown
    assert "Not finished: sum, seeds 1, 2" in shown


def test_a_dry_run_shows_the_plan_and_writes_nothing(
    study_file: Path, out: Path, runs: list[Run], write_run: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    write_run(runs[0])
    write_run(runs[1], finished=False)
    before = sorted(out.rglob("*"))
    assert ablate.main([str(study_file), "--dry-run", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("mixes: 2 arms × 3 seeds of ")
    assert any("sum: model.kwargs.mix=sum; " in text and " parameters, " in text for text in lines)
    assert [text.split(",")[0].strip() for text in lines[3:6]] == [
        "learned seed 0: done", "sum seed 0: to resume", "learned seed 1: to run",
    ]  # fmt: skip
    assert sorted(out.rglob("*")) == before


@pytest.mark.parametrize("starter", ["torchrun", "slurm"])
def test_printed_lines_start_the_runs_that_are_left(
    study_file: Path, out: Path, runs: list[Run], write_run: Callable[..., None], starter: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    write_run(runs[0])
    assert ablate.main([str(study_file), "--print", starter, "--out", str(out)]) == 0
    lines = [shlex.split(text) for text in capsys.readouterr().out.splitlines()]
    assert len(lines) == 5
    for words, run in zip(lines, runs[1:], strict=True):
        at = words.index("--config")
        assert Path(words[at - 1]).is_file()
        assert load_config(words[at + 1], [word for word in words[at + 2 :] if "=" in word]) == run.config
        assert (str(run.log) in words) == (starter == "slurm")


def test_a_study_over_parts_of_ones_own_plans_with_them_and_starts_their_file(
    study_file: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    file = study_file.with_name("parts_of_my_own.py")
    file.write_text(OWN)
    study_file.write_text(
        study_file.read_text().replace("{model.kwargs.mix: sum}", "{model.name: net_of_my_own, model.kwargs: {}}")
    )
    arguments = [str(study_file), "--out", str(out)]
    assert ablate.main([*arguments, "--dry-run"]) == 2
    assert "there is no model 'net_of_my_own'" in capsys.readouterr().err
    assert ablate.main([*arguments, "--dry-run", "--program", str(file)]) == 0
    assert ablate.main([*arguments, "--print", "torchrun", "--program", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()[-6:]
    assert all(f" {file} --config " in text for text in lines)


def test_equal_time_scales_epochs_by_rates_measured_before(
    study_file: Path, out: Path, write_run: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    study_file.write_text(study_file.read_text() + "equal: time\n")
    arguments = [str(study_file), "--out", str(out)]
    assert ablate.main([*arguments, "--print", "torchrun"]) == 2
    assert "run the study without --print" in capsys.readouterr().err
    study = load_study(study_file)
    for arm, rate in (("learned", 100.0), ("sum", 150.0)):
        write_run(plan_run(study, arm, 0, out / "probe" / arm, [], probe_keys()), rate=rate)
    assert ablate.main([*arguments, "--print", "torchrun"]) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert "schedule.epochs" not in first
    assert "schedule.epochs=9 schedule.warmup_epochs=1.5" in second


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.yaml"], "missing.yaml: no such study file"),
        (["STUDY", "--jobs", "0"], "--jobs: must be at least 1"),
        (["STUDY", "--dry-run", "--print", "torchrun"], "not allowed with argument"),
        (["STUDY", "--dry-run", "--collect"], "not allowed with argument"),
        (["STUDY", "--program", "nowhere.py"], "--program nowhere.py: no such file"),
        (["STUDY", "--program", "STUDY"], "or not .py"),
        (["STUDY", "--program", ABLATE, "--print", "slurm"], "--print slurm starts train.py"),
        (["STUDY", "model.kwargs.mix=sum"], "as arm sum of the study"),
        (["STUDY", "--dry-run", "model.kwargs.hds=3"], "arm learned: model.kwargs.hds: acmix_resnet26 takes no such"),
        (["STUDY", "--collect", "--out", "STUDY"], "--out"),
        (["STUDY", "run.keep=1", "run.keep=2"], "arm learned: command line: run.keep: duplicate key; give it once"),
    ],
)
def test_bad_usage_is_one_message_and_status_2(
    study_file: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = [str(study_file) if word == "STUDY" else word for word in arguments]
    assert ablate.main(typed) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert len(error.splitlines()) == 1


def test_an_arm_whose_network_cannot_take_the_images_is_refused_before_anything_runs(
    study_file: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    swin = "  swin: {model.name: swin_tiny_patch4_window7_224, model.kwargs: {window_size: 4}}\n"
    study_file.write_text(study_file.read_text() + swin)
    assert ablate.main([str(study_file), "--out", str(out)]) == 2
    assert "arm swin: model.kwargs.img_size: swin_tiny_patch4_window7_224 cannot take" in capsys.readouterr().err
    assert not (out / "runs").exists()


def test_a_real_run_and_one_that_cannot_start(study_file: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study_file.write_text(study_file.read_text().replace("seeds: 3", "seeds: [4]"))
    (out / "runs" / "sum").mkdir(parents=True)
    (out / "runs" / "sum" / "seed-4").write_text("a file where the run's folder should be")
    arguments = [str(study_file), "--out", str(out), "schedule.steps=1", "run.threads=1"]
    assert ablate.main(arguments) == 2
    told = capsys.readouterr()
    assert "error: sum seed 4 ended with status 2" in told.err
    assert "is not a folder; choose another run.dir" in told.err
    arm, _ = json.loads((out / "results.json").read_text())["arms"]
    summary = json.loads((out / "runs" / "learned" / "seed-4" / "summary.json").read_text())
    assert (arm["top1"], arm["parameters"]) == ([summary["last"]["top1"]], summary["parameters"])


@pytest.mark.slow
def test_a_study_stopped_in_the_middle_goes_on_and_runs_nothing_twice(
    study_file: Path, out: Path, launcher: Any
) -> None:
    study_file.write_text(study_file.read_text().replace("seeds: 3", "seeds: 2"))
    arguments = [
        study_file,
        "--out",
        out,
        "run.threads=1",
        "schedule.epochs=3",
        "run.log_every=1",
        "data.batch_size=32",
    ]
    second = out / "runs" / "sum" / "seed-0" / "metrics.jsonl"
    first = launcher.start(SCRIPT, *arguments)
    assert first.wait_for(lambda: second.is_file() and '"step": 5,' in second.read_text(), 200)
    os.kill(first.pid, signal.SIGTERM)
    assert first.wait(200) == 75, first.errors
    assert json.loads(second.with_name("summary.json").read_text())["status"] == "requeue"
    record = (out / "runs" / "learned" / "seed-0" / "metrics.jsonl").read_bytes()
    again = launcher.start(SCRIPT, *arguments, "--jobs", "2")
    assert again.wait(400) == 0, again.errors
    assert (out / "runs" / "learned" / "seed-0" / "metrics.jsonl").read_bytes() == record
    starts = [row for row in map(json.loads, second.read_text().splitlines()) if row["event"] == "start"]
    assert len(starts) == 2
    assert [arm["n"] for arm in json.loads((out / "results.json").read_text())["arms"]] == [2, 2]
