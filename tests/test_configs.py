"""Every shipped config is valid, says how to run it, and builds its model."""

from pathlib import Path

import pytest
import torch

from acmix import models
from acmix.config import load_config

ROOT = Path(__file__).resolve().parents[1]
NETWORKS = ("resnet26", "swin_tiny")
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def config_id(path: Path) -> str:
    return str(path.relative_to(ROOT / "configs"))


@pytest.mark.parametrize("path", CONFIGS, ids=config_id)
def test_config_opens_with_schema_command_cost_and_expected_result(path: Path) -> None:
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    schema = header[0].removeprefix("# yaml-language-server: $schema=")
    assert (path.parent / schema).resolve() == ROOT / "configs" / "schema.json"
    for field in ("Command:", "Cost:", "Expected:"):
        assert any(line.startswith(f"# {field}") for line in header), f"{path} has no {field} line"
    assert any(f"--config configs/{config_id(path)}" in line for line in header), f"{path}: another file's command"


@pytest.mark.parametrize("path", CONFIGS, ids=config_id)
def test_config_validates_and_builds_its_model(path: Path) -> None:
    config = load_config(path, [])
    classes = config.model.num_classes or 10
    with torch.device("meta"):
        model = models.create_model(config.model.name, num_classes=classes, **config.model.kwargs)
    assert sum(parameter.numel() for parameter in model.parameters()) > 100_000


def test_plain_twins_share_their_recipe_with_the_acmix_config() -> None:
    pairs = [
        ("acmix_resnet26", "resnet26"),
        ("acmix_swin_tiny", "swin_tiny"),
        ("acmix_pvt_tiny", "pvt_tiny"),
        ("cifar10/acmix_pvt_tiny", "cifar10/pvt_tiny"),
        ("acmix_san10", "san10"),
        ("cifar10/acmix_san10", "cifar10/san10"),
        *((f"{data}/acmix_{name}", f"{data}/{name}") for data in ("cifar10", "cifar100") for name in NETWORKS),
        ("cifar10/narrow_acmix_resnet26", "cifar10/narrow_resnet26"),
    ]
    for acmix_name, plain_name in pairs:
        acmix_config, plain = (
            load_config(ROOT / "configs" / f"{name}.yaml", []).model_dump(exclude={"model": True, "run": {"name"}})
            for name in (acmix_name, plain_name)
        )
        assert acmix_config == plain, f"{acmix_name} and {plain_name} differ beyond the model"


@pytest.mark.parametrize(("table", "key"), [("combine", "mix"), ("shift", "shift")])
def test_ablation_arms_differ_in_one_key_alone(table: str, key: str) -> None:
    arms = {}
    for path in sorted((ROOT / "configs" / "ablation").glob(f"{table}_*.yaml")):
        dump = load_config(path, []).model_dump(exclude={"run": {"name"}})
        arms[dump["model"]["kwargs"].pop(key)] = dump
    assert len(arms) == 5
    first, *rest = arms.values()
    assert all(other == first for other in rest)
