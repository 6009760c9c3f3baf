import json
import sys
from pathlib import Path
from typing import Any

import pytest

from acmix import models  # noqa: F401 - registers the models with timm
from acmix.ops.local_attention import tiled
from benchmarks import command

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmark.py"
FAST = ["--steps", "2", "--batch-size", "2"]


def run(*arguments: str | Path) -> int:
    return command.run("benchmark", Path("benchmarks"), [*map(str, arguments), *FAST])


def test_implementations_are_timed_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results.json"
    status = run("block:16x8", "--impl", "dense,tiled", "--against", "attention:16x8", "--mode", "both", "--json", out)
    assert status == 0
    results = json.loads(out.read_text())["results"]
    assert [(r["subject"], r["impl"], r["mode"]) for r in results] == [
        (subject, impl, mode)
        for mode in ("train", "infer")
        for subject, impl in (("block:16x8", "dense"), ("block:16x8", "tiled"), ("attention:16x8", "auto"))
    ]
    for result in results:
        assert result["n"] == 2
        assert result["images_per_second"] == pytest.approx(2 / result["seconds_median"])
        assert result["peak_bytes"] > 0
        assert 0 < result["roofline_share"] < 1
    assert results[0]["multiply_adds"] == results[1]["multiply_adds"] == (3 * 16**2 + 27 * 16 + 81 * 16 + 98 * 16) * 64
    machine = json.loads(out.read_text())["machine"]
    assert machine["threads"] == 1
    assert machine["device"]
    assert "torch" in machine["versions"]
    header = capsys.readouterr().out.splitlines()[0]
    expected = "subject impl mode median ms spread n images/s peak MiB GFLOP/s of roof time ratio"
    assert " ".join(header.split()) == expected


def test_an_implementation_that_fails_parity_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = tiled.forward

    def broken(*args: Any) -> Any:
        return sound(*args) * 1.001

    monkeypatch.setattr(tiled, "forward", broken)
    out = tmp_path / "results.json"
    assert run("attention:16x8", "--impl", "dense,tiled", "--json", out) == 1
    good, bad = json.loads(out.read_text())["results"]
    assert good["impl"] == "dense"
    assert good["seconds_median"] > 0
    assert bad["impl"] == "tiled"
    assert "seconds_median" not in bad
    assert "differs from the reference" in bad["refused"]
    assert "it is not timed" in capsys.readouterr().out


def test_the_authors_code_comes_from_a_clone(tmp_path: Path) -> None:
    (tmp_path / "ResNet").mkdir()
    (tmp_path / "ResNet" / "test_bottleneck.py").write_text(
        "from torch import nn\nclass ACmix(nn.Conv2d):\n"
        "    def __init__(self, inside, outside, stride):\n        super().__init__(inside, outside, 1, stride)\n"
    )
    out = tmp_path / "results.json"
    before = set(sys.modules)
    assert run("block:16x8", "--authors", tmp_path, "--against", "authors:block:16x8", "--json", out) == 0
    ours, theirs = json.loads(out.read_text())["results"]
    assert theirs["subject"] == "authors:block:16x8"
    assert theirs["multiply_adds"] == ours["multiply_adds"]
    assert not [name for name in set(sys.modules) - before if "bottleneck" in name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a model or block"),
        (["nosuch"], "neither a model of timm"),
        (["torchvision:nosuch"], "neither a model of timm"),
        (["block:18x8"], "18 channels do not divide"),
        (["block:16x8", "--impl", "nosuch"], "unknown impl"),
        (["block:16x8", "--impl", "triton"], "cannot run"),
        (["resnet26", "--impl", "tiled"], "takes no --impl tiled"),
        (["authors:resnet26"], "needs --authors PATH"),
        (["authors:resnet26", "--authors", "/nowhere"], "no ResNet/test_bottleneck.py there"),
        (["authors:nosuch", "--authors", "/nowhere"], "choose one of"),
        (["--suite", "--out", "/proc/nowhere/deep"], "--out /proc/nowhere/deep: cannot write there: No such file"),
        (["block:16x8", "--json", "/proc/nowhere/x.json"], "--json /proc/nowhere/x.json: cannot write there"),
        (["--suite", "--only", "nosuch*"], "no such row on this device"),
        (["block:16x8", "--threads", "1,0"], "must be at least 1"),
    ],
)
def test_bad_usage_is_one_message(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments, "--device", "cpu") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert len(error.splitlines()) == 1


def test_the_command_runs_and_is_quiet_on_stderr(launcher: Any) -> None:
    done = launcher.start(SCRIPT, "shift_conv:16x8", *FAST, fresh=True)
    assert done.wait() == 0
    assert done.errors == ""
    assert "shift_conv:16x8" in done.output
