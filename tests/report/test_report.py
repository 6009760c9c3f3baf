"""The page of scripts/report.py: self-contained, complete, safe, and clear on what is missing."""

import io
import json
import re
import runpy
from collections.abc import Callable
from contextlib import redirect_stdout
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from acmix.checkpoint.atomic import write_atomically
from acmix.config import load_config
from acmix.engine.confusion import class_report
from acmix.report.collect import collect
from acmix.report.evaluation import Evaluation
from acmix.report.tables import class_scores, results_table, worst_classes
from acmix.telemetry.run_log import RunLog
from scripts import report as report_program

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
model: {name: acmix_resnet26, kwargs: {stem: cifar, base_width: 8, layers: [1, 1, 1, 1]}}
data: {dataset: digits, image_size: 16, batch_size: 32, val_batch_size: 60, num_workers: 0}
schedule: {epochs: 1, steps: 2}
"""
SECTIONS = ["what", "results", "curves", "paths", "lesions", "classes", "mistakes", "environment", "commands"]

Report = Callable[..., "Page"]


class Page(HTMLParser):
    """A page as a browser reads it: text of each section, places that links and pictures lead to, tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text: dict[str, str] = {}
        self.links: list[str] = []
        self.tags: list[str] = []
        self.pictures: dict[str, int] = {}
        self._section = "head"
        self.size = len(html.encode())
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        if tag == "section":
            self._section = str(values["id"])
        if tag == "img":
            self.pictures[self._section] = self.pictures.get(self._section, 0) + 1
            assert values["alt"]
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]

    def handle_data(self, data: str) -> None:
        self.text[self._section] = self.text.get(self._section, "") + data


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """`report(run, ..., option, ...)`: the page of some runs."""

    def make(*arguments: object) -> Page:
        out = tmp_path_factory.mktemp("page") / "page.html"
        assert report_program.main([*map(str, arguments), "--out", str(out)]) == 0
        return Page(out.read_text())

    return make


def leave_run(folder: Path, *overrides: str, finished: bool = True, paths: bool = True, top1: float = 60.0) -> Path:
    """What a run leaves in its folder, by the code that writes it."""
    base = folder.parent / "base.yaml"
    base.parent.mkdir(parents=True, exist_ok=True)
    base.write_text(CONFIG)
    config = load_config(base, [*overrides, f"run.dir={folder}"])
    with redirect_stdout(io.StringIO()):
        log = RunLog(folder)
        write_atomically(folder / "config.yaml", config.dump())
        versions = {"python": "3.12", "torch": "2.10.0"}
        log.start({"config": config.model_dump(mode="json"), "parameters": 1234, "steps": 60, "versions": versions,
                   "git": "0123abc", "device": "cpu", "processes": 2, "threads": 1, "host": "here"})  # fmt: skip
        for step in (30, 60)[: 2 if finished else 1]:
            log.train({"step": step, "epoch": step // 30, "loss": 2 / step, "lr": 0.1, "images_per_second": 100.0})
            if paths:
                layers = [{"layer": f"blocks.{depth}", "stage": depth, "depth": depth} for depth in (1, 2)]
                log.probe("paths", step, [{**layer, "alpha": 0.4, "beta": 0.5 + step / 100} for layer in layers])
                log.probe("path_shares", step, [{**layer, "attention_share": 0.3} for layer in layers])
            row = {"step": step, "epoch": step // 30, "loss": 1.0, "top1": top1 + step / 60, "top5": 90.0, "count": 9}
            log.eval(row)
        if finished:
            log.end({"step": 60, "status": "done", "parameters": 1234})
        log.close()
    return folder


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory, report: Report) -> Page:
    """The page of five runs: three seeds of an arm, one of them killed, a hostile name, a plain network."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [
        leave_run(folder / "mixed" / f"seed-{i}", f"run.seed={i}", top1=60 + 2 * i, finished=i < 2) for i in range(3)
    ]
    hostile = leave_run(folder / "<img src=x onerror=alert(1)>", "model.kwargs.mix=attention", paths=False)
    plain = leave_run(folder / "plain" / "seed-0", "model.kwargs.block=plain", paths=False)
    return report(*runs, hostile, plain, "--no-evaluation")


def test_a_page_of_five_runs_fetches_nothing_and_is_small(five: Page) -> None:
    assert all(re.match(r"#\w+$|data:image/(svg\+xml|jpeg);base64,", link) for link in five.links)
    assert not {"link", "iframe", "object", "embed", "base", "form"} & set(five.tags)
    assert five.size < 3e6


def test_every_section_is_there(five: Page) -> None:
    assert [name for name in five.text if name != "head"] == SECTIONS
    assert five.pictures == {"curves": 4, "paths": 6}


def test_seeds_become_mean_and_deviation_and_arms_stand_side_by_side(five: Page) -> None:
    assert re.search(r"mixed\s*2\s*62\.00 ± 1\.41", five.text["results"])
    assert re.search(r"plain\s*1\s*61\.00(?! ±)", five.text["results"])
    assert re.search(r"model\.kwargs\.mix\s*–\s*attention\s*–", five.text["what"])


def test_runs_older_than_a_key_or_watched_otherwise_are_seeds_of_the_same_arm(tmp_path: Path) -> None:
    old, new = leave_run(tmp_path / "a" / "seed-0"), leave_run(tmp_path / "a" / "seed-1", "run.seed=1", "run.probes=[]")
    config = old / "config.yaml"
    config.write_text("".join(x for x in config.read_text().splitlines(keepends=True) if "path_freeze_epochs" not in x))
    other = leave_run(tmp_path / "b" / "seed-0", "optimizer.path_freeze_epochs=0.5")
    assert [[run.folder for run in arm.runs] for arm in collect([old, new, other])] == [[old, new], [other]]


def test_a_hostile_name_stays_text(five: Page) -> None:
    assert five.tags.count("script") == 1
    assert "<img src=x onerror=alert(1)>" in five.text["what"]


def test_what_is_missing_is_said(five: Page) -> None:
    assert "mixed seed 2: no end in its record (killed, or still running) at step 30 of 60" in five.text["what"]
    assert "plain: " in five.text["paths"]
    assert "has no ACmix blocks" in five.text["paths"]
    for section in ("lesions", "classes", "mistakes"):
        assert "Not evaluated: --no-evaluation leaves it out" in five.text[section]


def test_the_commands_train_each_run_again_with_its_processes(five: Page) -> None:
    assert "git checkout 0123abc" in five.text["commands"]
    assert re.search(
        r"torchrun --nproc-per-node 2 train.py --config \S+seed-1/config.yaml run.dir=", five.text["commands"]
    )
    assert "python scripts/report.py" in five.text["commands"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two updates."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(CONFIG)
    train = runpy.run_path(str(ROOT / "train.py"))["main"]
    arguments = ["--config", str(folder / "tiny.yaml"), f"run.dir={folder / 'tiny'}", "run.probes=[paths]"]
    assert train(arguments) == 0
    return folder / "tiny"


def test_what_needs_the_data_is_measured_where_they_can_be_opened(trained: Path, report: Report) -> None:
    page = report(trained, "--images", 40)
    assert page.pictures["lesions"] == page.pictures["classes"] == 1
    assert 1 <= page.pictures["mistakes"] <= 12
    assert "On 40 of 360 validation images" in page.text["classes"]
    assert "most often taken for" in page.text["classes"]
    assert "macro F1, %" in page.text["results"]
    assert re.search(r"block 4\s*convolution\s*mean", page.text["lesions"])
    assert "measured after training on 40 of 360" in page.text["paths"]
    assert "run.probes leaves out path_shares" in page.text["paths"]


def test_a_run_whose_weights_are_gone_is_reported_without_what_needs_them(tmp_path: Path, report: Report) -> None:
    page = report(leave_run(tmp_path / "alone", paths=False))
    assert "Not evaluated: " in page.text["lesions"]
    assert str(tmp_path / "alone") in page.text["lesions"]
    assert page.pictures["curves"] == 4


def test_a_run_killed_before_its_first_row_is_reported(tmp_path: Path, report: Report) -> None:
    run = leave_run(tmp_path / "cut", paths=False)
    (run / "metrics.jsonl").write_text('{"event": "start", "st')
    page = report(run, "--no-evaluation")
    assert "never started: its record is empty" in page.text["what"]
    assert "No run logged a step" in page.text["curves"]
    assert [name for name in page.text if name != "head"] == SECTIONS


def test_runs_of_one_seed_are_told_apart_and_are_no_seeds(tmp_path: Path, report: Report) -> None:
    runs = [leave_run(tmp_path / name / "run") for name in ("one", "two")]
    page = report(*runs, "--no-evaluation")
    assert "2 runs of the seed 0 alone" in page.text["results"]
    assert all(f"{run}-again" in page.text["commands"] for run in runs)


def test_the_best_epoch_is_one_with_a_finite_loss(tmp_path: Path) -> None:
    run = leave_run(tmp_path / "run", top1=60.0)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lucky = {"event": "eval", "step": 99, "epoch": 9, "loss": "nan", "top1": 99.0, "top5": 99.0, "count": 9}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (*rows, lucky)))
    table = results_table(collect([run]), {})
    assert float(table.rows[0][table.heads.index("best epoch, %")]) == 61.0


def test_classes_that_are_called_as_the_means_are_have_rows_of_their_own() -> None:
    names = ["accuracy", "macro avg", "other"]
    matrix = np.array([[3, 1, 0], [0, 4, 0], [2, 0, 2]])
    evaluation = Evaluation(12, 12, 75.0, matrix, names, class_report(matrix, names))
    assert [row[0] for row in class_scores([evaluation]).rows] == names
    assert {row[0]: row[2] for row in worst_classes([evaluation]).rows} == {
        "accuracy": "75.0", "macro avg": "100.0", "other": "50.0",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["{run}", "{run}"], "is given twice"),
        (["{run}/.."], "not a run folder.*it holds runs, such as"),
        (["{run}/nowhere"], "no such run folder"),
        (["{run}", "--out", "page.pdf"], "must end in .html"),
    ],
)
def test_what_is_no_run_is_refused(
    arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = leave_run(tmp_path / "run", paths=False)
    given = [text.format(run=run) for text in arguments]
    assert report_program.main(["--out", str(tmp_path / "page.html"), "--no-evaluation", *given]) == 2
    assert re.search(told, capsys.readouterr().err)
    assert not (tmp_path / "page.html").exists()
