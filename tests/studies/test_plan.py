"""The runs of a study: order, folders, configs, and what lies in a folder already."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from acmix.config import as_override, load_config
from acmix.config.resume import VERDICTS
from acmix.errors import UserError
from acmix.studies.found import WITHOUT_EFFECT, state_of
from acmix.studies.plan import Run, arm_config, check_overrides, plan_study
from acmix.studies.schema import Study, load_study


@pytest.fixture
def study(study_file: Path) -> Study:
    return load_study(study_file)


def plan(study: Study, out: Path, *overrides: str) -> list[Run]:
    return plan_study(study, out, overrides, {arm: {} for arm in study.arms})


def test_every_arm_runs_a_seed_before_the_next_seed(study: Study, tmp_path: Path) -> None:
    runs = plan(study, tmp_path / "out", "optimizer.lr=0.5")
    assert [run.label for run in runs[:3]] == ["learned seed 0", "sum seed 0", "learned seed 1"]
    run = runs[1]
    assert run.folder == tmp_path / "out" / "runs" / "sum" / "seed-0"
    assert run.log == tmp_path / "out" / "runs" / "sum" / "seed-0.log"
    assert (run.config.run.seed, run.config.run.name) == (0, "base")
    assert (run.config.model.kwargs["mix"], run.config.optimizer.lr) == ("sum", 0.5)


def test_the_arguments_of_a_run_make_its_config_whatever_its_folder_is_called(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/somewhere/else")
    for run in plan(study, tmp_path / "$HOME #2"):
        assert run.arguments[:4] == ("--config", str(study.base), "--resume", "auto")
        assert load_config(study.base, run.arguments[4:]) == run.config
        assert run.config.run.dir == str(run.folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.kwargs.mix", "sum"), ("model.kwargs.mix", "null"), ("model.kwargs.mix", "1e-3"),
        ("model.kwargs.x", None), ("model.kwargs.x", [1, "a b", {"c": True}]),
        ("model.kwargs.x", '"#" and: more'), ("optimizer.lr", 5e-05),
        ("data.root", "null"), ("data.root", '"quoted"'), ("data.root", None), ("data.root", "a # b"),
        ("optimizer.betas", [0.9, 0.99]), ("run.deterministic", True), ("run.name", "3"),
    ],
)  # fmt: skip
def test_an_override_is_read_back_as_the_value_it_was_made_of(study: Study, key: str, value: Any) -> None:
    dump = load_config(study.base, [as_override(key, value)]).model_dump(mode="json")
    for part in key.split("."):
        dump = dump[part]
    assert dump == value


def test_the_command_line_may_not_set_what_an_arm_or_the_study_sets(study: Study) -> None:
    check_overrides(study, ["optimizer.lr=1"])
    for override, message in (("model.kwargs.mix=convex", "as arm sum"), ("model.kwargs={}", "as arm sum"),
                              ("run.seed=1", "run.seed is set by the study")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            check_overrides(study, [override])


def test_an_arm_whose_config_is_wrong_is_named(study: Study) -> None:
    with pytest.raises(UserError, match=r"arm sum: .*schedule.warmup_epochs"):
        arm_config(study, "sum", ["schedule.warmup_epochs=70"])


def test_a_finished_run_is_adopted_whatever_its_threads_workers_or_name(
    study: Study, tmp_path: Path, write_run: Callable[..., None]
) -> None:
    other = plan(study, tmp_path, "run.threads=1", "data.num_workers=3", "run.name=other", "run.log_every=7")[1]
    run = plan(study, tmp_path)[1]
    assert state_of(run) == "new"
    write_run(other)
    assert state_of(run) == "done"


def test_a_run_of_an_older_schema_is_adopted(study: Study, tmp_path: Path, write_run: Callable[..., None]) -> None:
    run = plan(study, tmp_path)[0]
    lines = run.config.dump().splitlines(keepends=True)
    write_run(run, config="".join(line for line in lines if "path_lr_factor" not in line))
    assert state_of(run) == "done"


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_of_another_config_is_refused_with_the_keys_that_differ(
    study: Study, tmp_path: Path, write_run: Callable[..., None], finished: bool
) -> None:
    write_run(plan(study, tmp_path, "optimizer.lr=0.5", "model.kwargs.heads=2")[0], finished=finished)
    with pytest.raises(UserError) as refusal:
        state_of(plan(study, tmp_path)[0])
    kind = "a finished run" if finished else "a run"
    assert f"holds {kind} of another config" in str(refusal.value)
    assert "optimizer.lr is 0.5 there, 0.1 in the study" in str(refusal.value)
    assert "model.kwargs.heads is 2 there, null in the study" in str(refusal.value)


def test_a_run_without_an_end_is_resumed(study: Study, tmp_path: Path, write_run: Callable[..., None]) -> None:
    run = plan(study, tmp_path)[0]
    write_run(run, finished=False)
    assert state_of(run) == "begun"


def test_what_has_no_effect_on_a_run_is_never_what_a_resume_refuses() -> None:
    assert all(VERDICTS[key].kind in ("free", "place") and not VERDICTS[key].note for key in WITHOUT_EFFECT)
