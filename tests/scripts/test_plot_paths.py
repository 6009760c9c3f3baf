import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts import plot_paths

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "plot_paths.py"


def write_run(
    run: Path, steps: range, alpha: float = 0.5, beta: float = 0.25, stages: tuple[int, ...] = (1, 2, 2)
) -> Path:
    """A run whose alpha of block i is alpha + i + step / 1000, and whose beta does not move."""
    run.mkdir()
    rows: list[dict[str, Any]] = [{"event": "start", "step": 0, "config": {"model": {"name": "acmix_resnet26"}}}]
    for step in steps:
        layers = [
            {"layer": f"layer{stage}.{i}", "stage": stage, "alpha": alpha + i + step / 1000, "beta": beta}
            for i, stage in enumerate(stages)
        ]
        rows.append({"event": "paths", "step": step, "layers": layers})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def curve(axis: Any, index: int) -> np.ndarray:
    return np.asarray(axis.get_lines()[index].get_ydata())


def test_one_run_shows_its_last_weights_against_depth(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", range(0, 101, 10))
    figure = plot_paths.draw(plot_paths.read_runs([run], "paths"))
    weights, ratio = figure.axes[:2]
    np.testing.assert_allclose(curve(weights, 0), [0.6, 1.6, 2.6])
    np.testing.assert_allclose(curve(weights, 1), [0.25, 0.25, 0.25])
    np.testing.assert_allclose(curve(ratio, 0), np.log(np.array([0.6, 1.6, 2.6]) / 0.25))
    assert {"stage 1", "stage 2"} <= {text.get_text() for text in weights.texts}


def test_several_runs_show_mean_and_standard_deviation(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(i), range(0, 101, 10), alpha=0.5 + 0.1 * i) for i in range(3)]
    figure = plot_paths.draw(plot_paths.read_runs(runs, "paths"))
    weights = figure.axes[0]
    np.testing.assert_allclose(curve(weights, 0), [0.7, 1.7, 2.7])
    band = weights.collections[0].get_paths()[0].vertices[:, 1]
    np.testing.assert_allclose([band.min(), band.max()], [0.6, 2.8])


def test_unequal_lengths_compare_at_the_last_common_step(tmp_path: Path) -> None:
    short = write_run(tmp_path / "short", range(0, 51, 10))
    long = write_run(tmp_path / "long", range(0, 101, 25))
    figure = plot_paths.draw(plot_paths.read_runs([short, long], "paths"))
    np.testing.assert_allclose(curve(figure.axes[0], 0), [0.55, 1.55, 2.55])
    course = figure.axes[2]
    mean = course.get_lines()[0]
    np.testing.assert_array_equal(mean.get_xdata(), [0, 10, 20, 25, 30, 40, 50])
    np.testing.assert_allclose(mean.get_ydata(), 0.5 + np.asarray(mean.get_xdata()) / 1000)
    alone = course.get_lines()[1]
    np.testing.assert_array_equal(alone.get_xdata(), [50, 75, 100])


def test_a_path_without_weight_leaves_the_ratio_undefined_not_wrong(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", range(0, 11, 10), alpha=1.0, beta=0.0)
    ratio = plot_paths.draw(plot_paths.read_runs([run], "paths")).axes[1]
    assert np.isnan(curve(ratio, 0)).all()
    assert any("not defined" in text.get_text() for text in ratio.texts)


def write_probe(run: Path, *rows: list[dict[str, Any]]) -> Path:
    """Add rows of a probe named weights to a run, at steps 0, 10, 20 and so on."""
    with open(run / "metrics.jsonl", "a") as file:
        for i, layers in enumerate(rows):
            file.write(json.dumps({"event": "weights", "step": 10 * i, "layers": layers}) + "\n")
    return run


def test_any_other_probe_is_drawn_key_by_key(tmp_path: Path) -> None:
    places = [{"layer": "a", "stage": 1}, {"layer": "b", "stage": 1}, {"layer": "c", "stage": 2}]
    steps = [
        [{**places[0], "rms": t + 1.0, "dead": 2}, {**places[1], "rms": t + 3.0}, {**places[2], "rms": "nan"}]
        for t in range(3)
    ]
    run = write_probe(write_run(tmp_path / "a", range(0, 11, 10)), *steps)
    figure = plot_paths.draw(plot_paths.read_runs([run], "weights"))
    rms, dead, rms_course, dead_course = figure.axes
    assert [axis.get_ylabel() for axis in figure.axes] == ["rms", "dead", "rms", "dead"]
    np.testing.assert_array_equal(curve(rms, 0), [3, 5, np.nan])
    np.testing.assert_array_equal(curve(dead, 0), [2, np.nan, np.nan])
    np.testing.assert_array_equal(curve(rms_course, 0), [2, 3, 4])
    np.testing.assert_array_equal(curve(dead_course, 0), [2, 2, 2])
    assert figure.get_suptitle() == "acmix_resnet26: weights (1 run)"
    assert plot_paths.main([str(run), "--probe", "weights", "--out", str(tmp_path / "weights.svg")]) == 0


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_picture_is_written_whole(tmp_path: Path, suffix: str) -> None:
    run = write_run(tmp_path / "a", range(0, 11, 10))
    out = tmp_path / f"paths{suffix}"
    assert plot_paths.main([str(run), "--out", str(out)]) == 0
    if suffix == ".svg":
        assert ET.parse(out).getroot().tag.endswith("svg")
    else:
        assert out.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", out.name]


def test_bad_input_is_one_message_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "a", range(0, 11, 10))
    other = write_run(tmp_path / "b", range(0, 11, 10), stages=(1, 2, 3, 4))
    place = {"layer": "a", "stage": 1, "rms": 1.0}
    moved = write_probe(write_run(tmp_path / "moved", range(0, 11, 10)), [place], [{**place, "layer": "b"}])
    nothing = [{**place, "rms": None}]
    empty = write_probe(write_run(tmp_path / "empty", range(0, 11, 10)), nothing, nothing)
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "metrics.jsonl").write_text('{"event": "start", "step": 0}\n')
    out = str(tmp_path / "paths.png")
    cases: list[tuple[list[Any], str]] = [
        ([tmp_path / "missing", "--out", out], "does not exist"),
        ([tmp_path, "--out", out], "it holds runs"),
        ([plain, "--out", out], "no ACmix blocks"),
        ([run, other, "--out", out], "picture of its own"),
        ([run, run, "--out", out], "given twice"),
        ([run, "--probe", "rms", "--out", out], "probes it holds: paths"),
        ([plain, "--probe", "rms", "--out", out], "probes it holds: none"),
        ([moved, "--probe", "weights", "--out", out], "step 10 are not those of step 0"),
        ([empty, "--probe", "weights", "--out", out], "hold no number"),
        ([run, "--out", tmp_path / "paths.gif"], ".png, .svg or .pdf"),
        ([run, "--out", run / "metrics.jsonl" / "paths.png"], "cannot write there: Not a directory"),
    ]
    for arguments, message in cases:
        assert plot_paths.main([str(argument) for argument in arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert len(error.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "empty", "moved", "plain"]


def test_the_command_exits_2_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path / "missing"), "--out", str(tmp_path / "paths.png")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert (
        done.stderr
        == f"error: {tmp_path}/missing does not exist: give a run folder, the one that holds metrics.jsonl\n"
    )
