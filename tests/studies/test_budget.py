"""What all arms get the same of."""

from collections.abc import Callable
from pathlib import Path

import pytest

from acmix.errors import UserError
from acmix.studies.budget import check_budget, equal_parameters, scaled_epochs
from acmix.studies.outcome import measured_rate
from acmix.studies.plan import arm_config, plan_study
from acmix.studies.schema import load_study
from acmix.studies.size import size_of


def test_epochs_follow_the_rate_and_the_warm_up_keeps_its_share(study_file: Path) -> None:
    study = load_study(study_file)
    config = arm_config(study, "learned", [])
    added = scaled_epochs(study, config, {"learned": 100.0, "sum": 158.0})
    assert added == {"learned": {}, "sum": {"schedule.epochs": 9, "schedule.warmup_epochs": 1.5}}
    runs = plan_study(study, study_file.parent, ["schedule.epochs=6"], added)
    assert [run.config.schedule.epochs for run in runs[:2]] == [6, 9]
    assert scaled_epochs(study, config, {"learned": 100.0, "sum": 1.0})["sum"]["schedule.epochs"] == 1


def test_sizes_are_those_of_the_network_that_trains(study_file: Path) -> None:
    study = load_study(study_file)
    learned, total = (size_of(arm_config(study, arm, [])) for arm in study.arms)
    assert learned.parameters - total.parameters == 16  # alpha and beta of eight blocks
    assert learned.multiply_adds == total.multiply_adds > 1e6


def test_the_rate_leaves_out_the_first_updates(study_file: Path, write_run: Callable[..., None]) -> None:
    run = plan_study(load_study(study_file), study_file.parent, [], {"learned": {}, "sum": {}})[0]
    write_run(run, rate=80.0)
    record = run.folder / "metrics.jsonl"
    record.write_text(record.read_text().replace('"images_per_second": 80.0', '"images_per_second": 9.0', 1))
    assert measured_rate(run.folder) == 80.0


def test_arms_of_other_sizes_are_refused_where_parameters_are_to_be_equal(study_file: Path) -> None:
    study = load_study(study_file)
    equal_parameters(study, {"learned": 100_000, "sum": 102_900})
    with pytest.raises(UserError, match=r"learned has 100,000 parameters, sum has 96,000 \(-4.0%\).*more than 3%"):
        equal_parameters(study, {"learned": 100_000, "sum": 96_000})


@pytest.mark.parametrize("equal", ["time", "multiply_adds"])
def test_an_arm_may_not_set_the_epochs_that_an_equal_budget_sets(study_file: Path, equal: str) -> None:
    text = study_file.read_text() + f"  long: {{schedule.epochs: 9}}\nequal: {equal}\n"
    study_file.write_text(text)
    study = load_study(study_file)
    with pytest.raises(UserError, match=r"sets the epochs of arm long, which sets schedule.epochs"):
        check_budget(study, {arm: arm_config(study, arm, []) for arm in study.arms})
