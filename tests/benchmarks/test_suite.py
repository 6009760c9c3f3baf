import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from acmix.errors import UserError
from benchmarks.cases import build_case
from benchmarks.comparisons import network, scaling
from benchmarks.machine import Place
from benchmarks.page import write_page
from benchmarks.parity import ParityError
from benchmarks.results import Results, Row, measure_rows
from benchmarks.runs import first_step, trainer
from benchmarks.suite import BrokenError, Figure, NotMeasuredError, Suite, Target
from benchmarks.targets import TARGETS
from benchmarks.timing import Samples

CPU = torch.device("cpu")
SMALL = ("model.kwargs={stem: cifar, base_width: 8}", "data.batch_size=2", "augment.crop=none")


def compare_parts(suite: Suite, threads: int) -> Figure:
    cases = [build_case(f"{part}:16x8", suite.setting(threads)) for part in ("shift_conv", "attention")]
    results = suite.compare(*cases)
    assert results[0].seconds is not None
    assert results[1].seconds is not None
    return Figure(results[0].seconds.over(results[1].seconds), results, "a note")


def lacks_something(suite: Suite, threads: int) -> Figure:
    raise NotMeasuredError("needs a clone")


def fails_parity(suite: Suite, threads: int) -> Figure:
    raise ParityError("x differs from the reference")


def breaks(suite: Suite, threads: int) -> Figure:
    raise BrokenError("train.py ended with status 1")


def counts(suite: Suite, threads: int) -> Figure:
    return Figure(Samples((float(threads),)))


ROWS = (
    Target("measured", "convolution / attention", "cpu", 0.001, True, compare_parts, threads=(1,)),
    Target("missed", "the same, hoping for more", "cpu", 0.001, False, compare_parts, threads=(1,)),
    Target("lacking", "against the authors", "cpu", 1.0, True, lacks_something, threads=(1,)),
    Target("wrong", "a wrong one", "cpu", 1.0, True, fails_parity, threads=(1,)),
    Target("broken", "a broken one", "cpu", 1.0, True, breaks, threads=(1,)),
    Target("elsewhere", "on a GPU", "cuda", 1.0, True, compare_parts, threads=(1,)),
)


def measure_into(folder: Path, targets: Sequence[Target], asked: Sequence[Target] | None = None) -> list[Row]:
    """Measure the rows asked for and write file and page, as the command does."""
    suite, results = Suite(CPU, None, seconds=0.01), Results(folder, Place.of(CPU), targets)
    rows = measure_rows(suite, lambda row: results.put(row, suite), targets if asked is None else asked)
    write_page(folder, targets)
    return rows


def test_every_row_says_what_was_measured_or_why_not(tmp_path: Path) -> None:
    rows = measure_into(tmp_path, ROWS)
    assert [row["key"] for row in rows] == ["measured", "missed", "lacking", "wrong", "broken"]
    assert rows[0]["met"]
    assert rows[0]["n"] >= 5
    assert not rows[1]["met"]
    assert (rows[2]["not_measured"], rows[3]["refused"]) == ("needs a clone", "x differs from the reference")

    file, page = tmp_path / Place.of(CPU).file, (tmp_path / "RESULTS.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["RESULTS.md", file.name]
    assert ", missed** (a note) |" in page
    assert "| against the authors | ≥ 1 | not measured here: needs a clone |" in page
    assert "**refused**: x differs from the reference" in page
    assert "**refused**: train.py ended with status 1" in page
    assert "| on a GPU | ≥ 1 | not measured here |" in page
    assert f"## {Place.of(CPU)}" in page
    assert f"torch {torch.__version__.partition('+')[0]}" in page
    stored = json.loads(file.read_text())
    assert stored["rows"][0]["results"][0]["subject"] == "shift_conv:16x8"
    assert stored["rows"][0]["date"]
    assert stored["roofs"]["float32, 1 thread(s)"]["gflops_per_second"] > 1
    assert stored["machine"]["instructions"]


def test_rows_that_are_not_measured_again_stay(tmp_path: Path) -> None:
    figures = iter((1.0, 2.0, 3.0))

    def another(suite: Suite, threads: int) -> Figure:
        return Figure(Samples((next(figures),)))

    def now_lacks(suite: Suite, threads: int) -> Figure:
        if (tmp_path / Place.of(CPU).file).exists():
            raise NotMeasuredError("needs a clone")
        return Figure(Samples((7.0,)))

    first = Target("first", "the first", "cpu", 1.0, True, now_lacks, threads=(1,))
    second = Target("second", "the second", "cpu", 1.0, True, another, threads=(1,))
    third = Target("third", "the third", "cpu", 1.0, True, another, threads=(1,))
    measure_into(tmp_path, (first, second, third))
    measure_into(tmp_path, (first, third), asked=(third, first))
    stored = json.loads((tmp_path / Place.of(CPU).file).read_text())
    assert [(row["key"], row["value"]) for row in stored["rows"]] == [("first", 7.0), ("third", 3.0)]


def test_a_row_has_a_column_for_each_number_of_threads(tmp_path: Path) -> None:
    both = Target("both", "on one and two", "cpu", 1.5, True, counts)
    two = Target("two", "on two", "cpu", 1.5, True, counts, threads=(2,))
    suite, results = Suite(CPU, None), Results(tmp_path, Place.of(CPU), (both, two))
    results.put({**measure_rows(suite, lambda row: None, [both], threads=[1])[0]}, suite)
    for target in (both, two):  # on a machine of one core they cannot be measured
        results.put({**results.rows["both", 1], "key": target.key, "threads": 2, "value": 2.0}, suite)
    write_page(tmp_path, (both, two))
    page = (tmp_path / "RESULTS.md").read_text()
    assert "| what | target | 1 thread | 2 threads | revision, date |" in page
    assert "| on one and two | ≥ 1.5 | **1.00, n=1, missed** | 2.00, n=1 |" in page
    assert "| on two | ≥ 1.5 |  | 2.00, n=1 |" in page


def test_the_page_says_how_long_measuring_took_from_a_minute_on(tmp_path: Path) -> None:
    target = Target("both", "on one and two", "cpu", 1.5, True, counts)
    suite, results = Suite(CPU, None), Results(tmp_path, Place.of(CPU), [target])
    for seconds, told in ((20.0, False), (300.0, True)):
        row = measure_rows(suite, lambda row: None, [target], threads=[1])[0]
        results.put({**row, "took_seconds": seconds}, suite)
        write_page(tmp_path, [target])
        page = (tmp_path / "RESULTS.md").read_text()
        assert ("Measuring these rows took 5 minutes." in page, "Measuring" in page) == (told, told)


def test_the_page_has_a_table_for_each_machine(tmp_path: Path) -> None:
    places = [Place("cpu", "Xeon (family 6, model 143)", "AVX512", 2), Place("cpu", "EPYC", "AVX2", 4)]
    places.append(Place("cuda", "NVIDIA H100", "", 16))
    for place in places:
        Results(tmp_path, place, ROWS).write()
    write_page(tmp_path, ROWS)
    page = (tmp_path / "RESULTS.md").read_text()
    assert [line for line in page.splitlines() if line.startswith("## ")] == [
        "## EPYC, AVX2, 4 cores",
        "## Xeon (family 6, model 143), AVX512, 2 cores",
        "## NVIDIA H100, GPU, 16 cores",
    ]
    assert (tmp_path / "results-cpu-xeon-family-6-model-143-avx512.json").exists()


def test_the_page_tells_what_was_tried_for_targets_that_were_missed(tmp_path: Path) -> None:
    why = "two designs, neither faster"
    targets = [
        Target(key, f"{key}, at its size", "cpu", limit, True, counts, threads=(1,), tried=why)
        for key, limit in (("first", 1), ("second", 2), ("third", 3))
    ]
    measure_into(tmp_path, targets)
    assert f"- second, third: {why}" in (tmp_path / "RESULTS.md").read_text().splitlines()


def test_a_damaged_file_of_results_is_named(tmp_path: Path) -> None:
    (tmp_path / Place.of(CPU).file).write_text("{}")
    with pytest.raises(UserError, match="not a file of the benchmark suite"):
        Results(tmp_path, Place.of(CPU), ROWS)


def test_targets_are_told_met_by_their_direction() -> None:
    met = {target.key: (target.met(target.limit * 0.9), target.met(target.limit * 1.1)) for target in TARGETS}
    assert met["block_64x56"] == (False, True)
    assert met["resnet26_train"] == (True, False)
    assert len(met) == len(TARGETS)


def test_rows_that_compare_with_the_authors_need_a_clone() -> None:
    blocks = [t for t in TARGETS if t.key.startswith("block_") and not t.key.endswith("_scaling")]
    rows = measure_rows(Suite(CPU, None), lambda row: None, blocks, threads=[1])
    assert len(rows) == 6
    assert {row["not_measured"] for row in rows} == {"needs --authors PATH"}


def test_the_model_of_a_config_is_timed_beside_another_in_training_and_inference() -> None:
    config = str(Path(__file__).parents[2] / "configs" / "cifar10" / "narrow_resnet26.yaml")
    for mode in ("train", "infer"):
        suite = Suite(CPU, None, seconds=0.01)
        figure = network(suite, 1, ours="resnet10t", plain=config, mode=mode, image_size=32, batch_size=2)
        assert [result.case.label for result in figure.results] == ["resnet10t", "narrow_resnet26"]
        assert {result.mode for result in figure.results} == {mode}
        assert figure.value.n >= 5


def test_threads_change_within_the_process_and_with_them_the_roof() -> None:
    suite = Suite(CPU, None, seconds=0.01)
    figure = scaling(suite, 2, subject="attention:16x8")
    assert [result.case.setting.threads for result in figure.results] == [1, 2, 1, 2]
    assert [result.case.setting.channels_last for result in figure.results] == [False, False, True, True]
    assert {key[2] for key in suite.bench.rooflines} == {1, 2}
    assert figure.note.startswith("NCHW ")


@pytest.mark.slow
def test_the_trainer_runs_beside_a_bare_loop() -> None:
    figure = trainer(Suite(CPU, None), 1, window=1, rounds=2, overrides=SMALL)
    assert figure.value.n == 2
    assert all(0.01 < ratio < 100 for ratio in figure.value.values)


@pytest.mark.slow
def test_the_first_step_is_timed_from_the_start_of_the_process() -> None:
    assert 0.5 < first_step(Suite(CPU, None), 1, rounds=1).value.median < 300
