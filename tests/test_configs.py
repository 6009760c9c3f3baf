"""Every shipped config and every arm of a shipped study is valid, says how to run it, and builds its model."""

from pathlib import Path

import pytest

from acmix.config import Config, load_config
from acmix.studies.plan import arm_config
from acmix.studies.schema import load_study
from acmix.studies.size import size_of

ROOT = Path(__file__).resolve().parents[1]
NETWORKS = ("resnet26", "swin_tiny")
STUDIES = sorted((ROOT / "configs" / "studies").glob("*.yaml"))
OF_RECIPES = ("gap", "grow")  # studies of how long and how fast to train, or from what
CONFIGS = sorted(set((ROOT / "configs").rglob("*.yaml")) - set(STUDIES))


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
    build_on_meta(load_config(path, []))


def build_on_meta(config: Config) -> None:
    """Build the network without memory and pass an image of the config's size through it."""
    model = config.model.model_copy(update={"num_classes": config.model.num_classes or 10})
    size = size_of(config.model_copy(update={"model": model}))
    assert size.parameters > 100_000
    assert size.multiply_adds > 1_000_000


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


@pytest.mark.parametrize("path", STUDIES, ids=config_id)
def test_study_says_how_to_run_it_and_each_arm_builds_its_model(path: Path) -> None:
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for field in ("Command:", "Cost:", "Expected:"):
        assert any(line.startswith(f"# {field}") for line in header), f"{path} has no {field} line"
    assert any(f"ablate.py configs/{config_id(path)}" in line for line in header), f"{path}: another file's command"
    study = load_study(path)
    assert study.name == path.stem
    for arm in study.arms:
        build_on_meta(arm_config(study, arm, []))


@pytest.mark.parametrize("path", [path for path in STUDIES if path.stem not in OF_RECIPES], ids=config_id)
def test_arms_differ_in_the_model_and_its_path_weights_alone(path: Path) -> None:
    study = load_study(path)
    configs = [arm_config(study, arm, []) for arm in study.arms]
    policies = {"path_lr_factor", "path_weight_decay", "path_freeze_epochs"}
    recipes = [config.model_dump(exclude={"model": True, "optimizer": policies}) for config in configs]
    assert all(recipe == recipes[0] for recipe in recipes)


@pytest.mark.parametrize(("table", "key"), [("combine", "mix"), ("shift", "shift")])
@pytest.mark.parametrize("prefix", ["", "imagenet_"])
def test_the_papers_ablations_have_five_arms_that_differ_in_one_key(prefix: str, table: str, key: str) -> None:
    study = load_study(ROOT / "configs" / "studies" / f"{prefix}{table}.yaml")
    assert study.arms.pop("learned") == ()
    assert len(study.arms) == 4
    assert all(overrides == (f"model.kwargs.{key}={arm}",) for arm, overrides in study.arms.items())
