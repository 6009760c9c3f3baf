import json
from pathlib import Path

import torch

from benchmarks.parity import ParityError
from benchmarks.report import machine_row, write_json, write_page
from benchmarks.suite import Figure, NotMeasuredError, Suite, Target
from benchmarks.targets import TARGETS, run_targets
from benchmarks.timing import Samples

CPU = torch.device("cpu")


def compare_blocks(suite: Suite) -> Figure:
    results = suite.compare(suite.setting, "block:16x8", "attention:16x8")
    assert results[0].seconds is not None
    assert results[1].seconds is not None
    return Figure(results[0].seconds.over(results[1].seconds), results, "a note")


def lacks_something(suite: Suite) -> Figure:
    raise NotMeasuredError("needs a clone")


def fails_parity(suite: Suite) -> Figure:
    raise ParityError("x differs from the reference")


ROWS = (
    Target("measured", "block / attention", "cpu", 0.001, True, compare_blocks),
    Target("missed", "the same, hoping for more", "cpu", 0.001, False, compare_blocks),
    Target("lacking", "against the authors", "cpu", 1.0, True, lacks_something),
    Target("wrong", "a broken one", "cpu", 1.0, True, fails_parity),
    Target("elsewhere", "on a GPU", "cuda", 1.0, True, compare_blocks),
)


def test_every_row_says_what_was_measured_or_why_not(tmp_path: Path) -> None:
    lines: list[str] = []
    rows = run_targets(Suite(CPU, None, seconds=0.01), lines.append, ROWS)
    assert [row["key"] for row in rows] == ["measured", "missed", "lacking", "wrong"]
    assert rows[0]["met"]
    assert rows[0]["n"] >= 5
    assert not rows[1]["met"]
    assert (rows[2]["not_measured"], rows[3]["refused"]) == ("needs a clone", "x differs from the reference")
    assert len(lines) == 4

    write_json({"machine": machine_row(CPU), "targets": rows}, tmp_path / "results-cpu.json")
    write_page(tmp_path)
    page = (tmp_path / "RESULTS.md").read_text()
    assert "| the same, hoping for more (a note) |" in page
    assert "**missed**" in page
    assert "| against the authors | not measured here: needs a clone |" in page
    assert f"torch {torch.__version__.partition('+')[0]}" in page
    for target in TARGETS:  # nothing was run on a GPU: no figure, only the rows
        assert (f"| {target.what} | not measured here |" in page) == (target.device == "cuda")
    stored = json.loads((tmp_path / "results-cpu.json").read_text())
    assert stored["targets"][0]["results"][0]["subject"] == "block:16x8"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["RESULTS.md", "results-cpu.json"]


def test_targets_are_told_met_by_their_direction() -> None:
    met = {target.key: (target.met(target.limit * 0.9), target.met(target.limit * 1.1)) for target in TARGETS}
    assert met["block_64x56"] == (False, True)
    assert met["resnet26"] == (True, False)
    assert len(met) == len(TARGETS) == 15


def test_rows_that_compare_with_the_authors_need_a_clone() -> None:
    rows = run_targets(Suite(CPU, None), lambda line: None, [t for t in TARGETS if t.key.startswith("block_")])
    assert len(rows) == 6
    assert {row["not_measured"] for row in rows} == {"needs --authors PATH"}


def test_samples_of_one_value_have_no_spread() -> None:
    assert Figure(Samples((2.0,))).value.spread == 0.0
