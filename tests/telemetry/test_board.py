"""What TensorBoard shows beside the curves: charts of each stage, pictures by depth, hyperparameters with metrics."""

from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from acmix.telemetry.run_log import RunLog

PATHS: list[Any] = [
    {"layer": "a", "stage": 1, "depth": 1, "alpha": 0.25, "beta": 0.5},
    {"layer": "b", "stage": 2, "depth": 2, "alpha": 1.0, "beta": 0.0},
]
SHARES: list[Any] = [
    {"layer": "a", "stage": 1, "depth": 1, "attention_share": 0.5},
    {"layer": "b", "stage": 2, "depth": 2, "attention_share": None},
]
CONFIG = {
    "model": {"name": "m", "kwargs": {"mix": "sum", "depths": [1, 2]}},
    "data": {"root": "there"},
    "optimizer": {"lr": 0.1, "eps": None},
    "run": {"seed": 3, "name": "run"},
}


def train(run: Path, epochs: range, *, resume_step: int | None = None) -> None:
    log = RunLog(run, resume_step=resume_step)
    log.start({"config": CONFIG})
    for epoch in epochs:
        log.probe("paths", 2 * epoch, PATHS)
        log.probe("path_shares", 2 * epoch, SHARES)
        log.eval({"step": 2 * epoch, "epoch": epoch, "loss": 0.5, "top1": 90.0, "top5": 99.0, "count": 360})
    log.end({"step": 2 * epochs[-1], "last": {"top1": 90.0, "top5": 99.0, "loss": 0.5}})
    log.close()


def values_of(run: Path) -> list[tuple[int, Summary.Value]]:
    return [
        (event.step, value)
        for file in sorted((run / "tensorboard").iterdir())
        for event in LegacyEventFileLoader(str(file)).Load()
        for value in event.summary.value
    ]


def test_a_stage_has_one_chart_of_alpha_beta_and_share(tmp_path: Path) -> None:
    train(tmp_path, range(1, 3))
    (layout,) = (value for _, value in values_of(tmp_path) if value.tag == "custom_scalars__config__")
    (category,) = layout_pb2.Layout.FromString(layout.tensor.string_val[0]).category
    charts = {chart.title: list(chart.multiline.tag) for chart in category.chart}
    assert charts == {
        f"stage {stage}": [
            f"^paths/alpha/{stage}/mean$",
            f"^paths/beta/{stage}/mean$",
            f"^path_shares/attention_share/{stage}/mean$",
        ]
        for stage in (1, 2)
    }


def test_every_epoch_has_a_picture_and_a_resume_draws_the_newest_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("acmix.telemetry.board._PICTURES", 2)
    train(tmp_path, range(1, 5))
    pictures = [(step, value) for step, value in values_of(tmp_path) if value.tag == "paths/depth"]
    assert [step for step, _ in pictures] == [2, 4, 6, 8]
    with Image.open(BytesIO(pictures[0][1].image.encoded_image_string)) as picture:
        assert picture.format == "PNG"
        assert picture.width > 600
    train(tmp_path, range(5, 6), resume_step=8)
    again = [step for step, value in values_of(tmp_path) if value.tag == "paths/depth"]
    assert again == [6, 8, 10]


def test_the_end_ties_the_config_to_the_last_metrics(tmp_path: Path) -> None:
    train(tmp_path, range(1, 2))
    data = {
        value.tag: HParamsPluginData.FromString(value.metadata.plugin_data.content)
        for _, value in values_of(tmp_path)
        if value.metadata.plugin_data.plugin_name == "hparams"
    }
    experiment = data["_hparams_/experiment"].experiment
    assert {info.name.tag for info in experiment.metric_infos} == {"eval/top1", "eval/top5", "eval/loss"}
    chosen = data["_hparams_/session_start_info"].session_start_info.hparams
    assert chosen["optimizer.lr"].number_value == 0.1
    assert chosen["model.kwargs.mix"].string_value == "sum"
    assert chosen["model.kwargs.depths"].string_value == "[1, 2]"
    assert set(chosen) == {"model.name", "model.kwargs.mix", "model.kwargs.depths", "optimizer.lr", "run.seed"}


def test_a_run_without_blocks_has_curves_only(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.eval({"step": 2, "epoch": 1, "loss": 0.5, "top1": 90.0, "top5": 99.0, "count": 360})
    log.close()
    assert {value.tag for _, value in values_of(tmp_path)} == {"eval/loss", "eval/top1", "eval/top5"}
