"""A trained run as a folder that timm loads, and the files of a run as timm takes them."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.models import save_for_hf
from torch import nn

from acmix import models
from acmix.config import load_config
from acmix.errors import UserError
from acmix.export import hub
from scripts import export_hf

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {
    "resnet": """
model: {name: acmix_resnet26, kwargs: {base_width: 8, stem: cifar, kernel_att: 3, in_chans: 1}}
data: {dataset: digits, image_size: 8, batch_size: 16, val_batch_size: 120, num_workers: 0}
augment: {crop: none}
schedule: {epochs: 1, steps: 2}
ema: {decay: 0.5}
run: {name: little}
""",
    "swin": """
model: {name: acmix_swin_tiny, kwargs: {embed_dim: 8, depths: [1, 1, 1, 1], heads: [1, 1, 2, 2], patch_size: 2}}
data: {dataset: digits, image_size: [16, 24], batch_size: 16, val_batch_size: 120, num_workers: 0}
augment: {crop: none}
schedule: {epochs: 1, steps: 1}
""",
}


@pytest.fixture(scope="module", params=CONFIGS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "config.yaml").write_text(CONFIGS[request.param])
    main = runpy.run_path(str(ROOT / "train.py"))["main"]
    assert main(["--config", str(folder / "config.yaml"), f"run.dir={folder / 'run'}"]) == 0
    return folder / "run"


def built(run: Path, checkpoint: Path) -> nn.Module:
    """The run's network, with weights that timm's own reader takes from a file."""
    config = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["config"]
    kwargs = dict(config["model"]["kwargs"])
    if "swin" in config["model"]["name"]:
        kwargs["img_size"] = config["data"]["image_size"]
    return timm.create_model(config["model"]["name"], num_classes=10, checkpoint_path=checkpoint, **kwargs)


@pytest.mark.parametrize("weights", ["auto", "raw"])
def test_an_exported_run_is_loaded_by_timm_with_its_sizes_classes_and_weights(weights, run, tmp_path, capsys):
    out = tmp_path / "hub" / "network"
    assert export_hf.main(["--checkpoint", str(run), "--out", str(out), "--weights", weights]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["out"] == str(out)
    network = timm.create_model(f"local-dir:{out}", pretrained=True)
    averaged = run / "checkpoints" / "best" / "ema.safetensors"
    file = averaged if weights == "auto" and averaged.exists() else averaged.with_name("model.safetensors")
    want = built(run, file)
    got = resolve_data_config(model=network)
    assert (got["crop_pct"], got["std"][0]) == (1.0, pytest.approx(0.349))
    images = torch.randn(2, *got["input_size"], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(images), want.eval()(images), rtol=0, atol=0)
    assert sorted(file.name for file in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert [file.name for file in out.parent.iterdir()] == ["network"]


def test_the_card_states_data_recipe_figures_and_path_weights(run, tmp_path):
    assert export_hf.main(["--checkpoint", str(run / "checkpoints" / "last"), "--out", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    summary = json.loads((run / "summary.json").read_text())
    last = summary["last"]
    network = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    mixes = [name.removesuffix(".alpha") for name in network.state_dict() if name.endswith("mix.alpha")]
    for part in (
        "`digits`", "10 classes", "optimizer:", f"top1 {last['top1']:.2f} %", f"on {last['count']} images",
        f"{summary['parameters']:,} parameters", *(f"| {name.removesuffix('.mix')} |" for name in mixes),
    ):  # fmt: skip
        assert part in card


def test_a_folder_that_holds_something_is_replaced_only_if_asked(run, tmp_path, capsys):
    (tmp_path / "own.txt").write_text("mine")
    arguments = ["--checkpoint", str(run), "--out", str(tmp_path)]
    assert export_hf.main(arguments) == 2
    assert "holds something already" in capsys.readouterr().err
    assert (tmp_path / "own.txt").exists()
    assert export_hf.main([*arguments, "--force"]) == 0
    assert (tmp_path / "model.safetensors").exists()


def test_a_folder_that_holds_the_run_is_never_replaced(run, capsys):
    before = sorted(run.rglob("*"))
    for out in (run, run.parent, run / "checkpoints"):
        assert export_hf.main(["--checkpoint", str(run / "checkpoints" / "last"), "--out", str(out), "--force"]) == 2
        assert "choose another folder" in capsys.readouterr().err
    assert sorted(run.rglob("*")) == before


def test_the_card_of_a_run_has_its_figures_also_with_a_config_from_elsewhere(run, tmp_path):
    config, out = tmp_path / "config.yaml", tmp_path / "out"
    config.write_text((run / "config.yaml").read_text())
    assert export_hf.main(["--checkpoint", str(run), "--config", str(config), "--out", str(out)]) == 0
    assert "- Trained on 1 × cpu" in (out / "README.md").read_text()


def test_the_card_says_of_a_loss_that_is_not_finite_that_it_is_not(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy, symlinks=True)
    progress = copy / "checkpoints" / "last" / "progress.json"
    values = json.loads(progress.read_text())
    values["history"][-1]["loss"] = "nan"
    progress.write_text(json.dumps(values))
    network = models.create_model("resnet18", 10).eval()
    config = load_config(copy / "config.yaml")
    card = hub.model_card(hub.Trained(network, config, None, None, values, copy))
    assert "loss nan on" in card


def test_the_card_of_a_resumed_run_says_which_part_its_seconds_are_of(run, tmp_path):
    rows = [
        {"event": "start", "step": 0, "resumed_from": None},
        {"event": "start", "step": 4, "resumed_from": 4},
        {"event": "end", "step": 9, "seconds": 12.3},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    network = models.create_model("resnet18", 10).eval()
    card = hub.model_card(hub.Trained(network, load_config(run / "config.yaml"), None, None, {}, tmp_path))
    assert "- Seconds: 12, after it was resumed at step 4" in card


def test_a_network_without_what_timm_asks_for_is_refused_by_the_name_of_it(run, tmp_path):
    network = models.create_model("resnet18", 10).eval()
    del network.num_features
    trained = hub.Trained(network, load_config(run / "config.yaml"), None, None, {}, run)
    with pytest.raises(UserError, match="ResNet has no num_features, which timm"):
        hub.write_folder(trained, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "/nowhere"], "no such run"),
        (["--checkpoint", "RUN", "model.name=acmix_resnet27"], "did you mean"),
        (["--checkpoint", "RUN", "model.kwargs.mix=sum"], "do not fit"),
        (["--checkpoint", "RUN", "--out", "/proc/x/y"], "--out /proc/x/y: cannot write there"),
    ],
)
def test_what_cannot_be_exported_is_one_message_and_leaves_nothing(arguments, message, run, tmp_path, capsys):
    given = [str(run) if argument == "RUN" else argument for argument in arguments]
    assert export_hf.main(["--out", str(tmp_path / "out"), *given]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_saved_by_timm_itself_and_loaded_again(run, tmp_path):
    network = built(run, run / "checkpoints" / "last" / "model.safetensors")
    save_for_hf(network, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    for name, value in network.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
